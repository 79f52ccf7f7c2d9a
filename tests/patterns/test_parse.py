import re

import pytest

from visattn import patterns
from visattn.patterns import Dense, Neighborhood, parse

ROUND_TRIPS = [
    "dense",
    "na(window=7x7)",
    "na(window=7)",
    "na(window=-1x5x5, stride=1x4x4)",
    "na(window=3x3, dilation=2, causal=1x0)",
    "na(window=8, stride=8, causal=true)",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_text_round_trip(text):
    pattern = parse(text)
    assert str(parse(str(pattern))) == str(pattern)
    assert parse(str(pattern)) == pattern
    assert str(pattern) == text.replace("1x0", "1x0")


def test_values():
    assert parse("na(7x7)") == Neighborhood((7, 7))
    assert parse(" NA ( window = 3x5 , causal = true ) ") == Neighborhood((3, 5), causal=True)
    assert parse(Dense()) is not None and parse("dense()") == Dense()
    assert Neighborhood([3, 5]) == Neighborhood((3, 5))
    assert len({parse("na(7)"), Neighborhood(7)}) == 1


def test_every_pattern_has_a_name_and_a_place_in_the_registry():
    assert len({kind.name for kind in patterns.PATTERNS}) == len(patterns.PATTERNS)
    assert all(kind.__name__ in patterns.__all__ for kind in patterns.PATTERNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("na[7]", r"is not of the form name\(parameter=value"),
        ("na(window=7", r"'na\(window=7' has 1 '\(' and 0 '\)': every bracket needs its partner"),
        ("na(window=7))", r"has 1 '\(' and 2 '\)'"),
        ("best(of=[dense, na(window=7))", r"has 1 '\[' and 0 '\]'"),
        ("combner", r"unknown pattern 'combner' \(did you mean 'combiner'\?\); `visattn patterns` lists all$"),
        ("nat(7)", r"unknown pattern 'nat' \(did you mean 'na'\?\)"),
        ("topc(keep=0.1)", r"did you mean 'topk' or 'topp'\?"),
        ("neighborhood(7)", r"did you mean 'na'\?"),
        ("Natten(7)", r"did you mean 'na'\?"),
        ("qqq", r"unknown pattern 'qqq'; patterns: .*dense.*; names that stand for one: .*combiner"),
        ("na(windw=7)", r"na has no parameter 'windw' \(did you mean 'window'\?\); parameters: window, stride"),
        ("na(window=7, window=5)", r"'window' is given twice"),
        ("na(window=7, 5)", r"'5' in .* is not of the form parameter=value; values per axis stand together, like 7x7"),
        ("na", r"na needs window, like na\(window=7\)"),
        ("topp(keep=1)", r"topp has no parameter 'keep'; parameters: p, "),
        ("na(window=big)", r"window=big in .* is not a number, sizes like 7x7, true, false or none"),
        ("na(window=0)", r"window=0 must be a whole number of at least 1 or -1, or one per axis like 7x7"),
        ("na(window=2.5)", r"window=2.5 must be a whole number"),
        ("na(window=3, stride=4)", r"stride 4 is larger than window 3.*use a stride of at most 3"),
        ("na(window=3x3, stride=1x1x1)", r"must have equally many axes"),
        ("na(window=-1, dilation=2)", r"window -1 is the whole axis, so dilation 2 means nothing"),
        ("dense(3)", r"dense has no parameters, and 'dense\(3\)' has '3': write dense"),
        ("dense(window=3)", r"dense has no parameter"),
        (Dense, r"pattern Dense is a class: pass an instance, Dense\(...\)"),
        (None, r"pattern None is a NoneType: pass a Pattern or a text"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("name", sorted(kind.name for kind in patterns.PATTERNS))
def test_what_a_pattern_needs_is_told_by_a_text_that_can_be_parsed(name):
    try:
        parse(name)
    except ValueError as error:
        parse(re.search(r"needs [\w, ]+, like (.*)$", str(error))[1])


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"pattern 7 is a int: pass a Pattern or a text like"):
        parse(7)
