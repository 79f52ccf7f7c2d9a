"""Candidates of some layers alone."""

import pytest

from visattn.tuning.places import by_layer, names_at, read_lines

HEADS = "perhead(heads={0: na(window=3x3)}, rest=dense)"


def test_lines_of_a_file():
    names, only = read_lines(
        ["na(window=(3, 3))", f"{HEADS} @ a.0, b.attn", f"{HEADS} @ a.1", "topk @ a.0", "topk(keep=0.2) in fp8", "topk"]
    )
    assert names == ("na(window=3x3)", HEADS, "topk", "topk(keep=0.2) in fp8")
    # A line for all layers is for all.
    assert only == {HEADS: {"a.0", "b.attn", "a.1"}}
    assert read_lines(["topk", "topk @ a"])[1] == {} and read_lines([]) == ((), {})
    layers = by_layer(only, ["a.0", "a.1", "b"], {"b.attn": "b"})
    assert layers == {HEADS: {"a.0", "a.1", "b"}}
    assert names_at("b", names, layers) == list(names) and HEADS not in names_at("c", names, layers)
    with pytest.raises(ValueError, match=r"is for 'a\.1', which is no layer here: give one of a\.0, b"):
        by_layer(only, ["a.0", "b"], {"b.attn": "b"})
    # Dense attention is for all layers.
    assert read_lines(["dense @ a"]) == (("dense",), {})
    with pytest.raises(ValueError, match="is not of the form PATTERN, or PATTERN @ LAYER, LAYER"):
        read_lines(["topk @ a,"])
    with pytest.raises(ValueError, match="nosuch"):
        read_lines(["nosuch @ a"])
    for line in ("topk @", "@ a", "topk @ a,", " "):
        with pytest.raises(ValueError, match="is not of the form PATTERN, or PATTERN @ LAYER, LAYER"):
            read_lines([line])
