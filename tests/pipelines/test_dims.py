"""Patterns whose dims are not those of the tokens: the error names the form that fits."""

import pytest

import visattn
from tests.support import tiny_models
from visattn import parse
from visattn.dims import check_dims


def test_dims_that_do_not_fit_name_the_right_form():
    def error(pattern, dims):
        with pytest.raises(ValueError) as caught:
            check_dims(parse(pattern), dims, "M")
        return str(caught.value)

    assert error("na(window=7x7)", 3) == (
        "na(window=7x7) has 2 axes but the tokens of M are a (frames, height, width) grid: "
        "use na(window=-1x7x7) (every frame) or na(window=1x7x7) (each frame alone)"
    )
    assert error("na(window=8x8, stride=4x4)", 3).endswith(
        "use na(window=-1x8x8, stride=1x4x4) (every frame) or na(window=1x8x8, stride=1x4x4) (each frame alone)"
    )
    assert error("na(window=3x7x7)", 2).endswith("a (height, width) grid: use na(window=7x7)")
    assert error("na(window=7x7)", 1).endswith("give 1 value")
    listed = "has 2 axes but the tokens of M are a (frames, height, width) grid: use"
    assert error("topk(block=8x8, causal=0x1)", 3).endswith(
        f"{listed} topk(block=1x8x8, causal=0x0x1) (blocks of one frame)"
    )
    assert error("vsa(block=8x8)", 3) == f"vsa(block=8x8) {listed} vsa(block=1x8x8) (blocks of one frame)"
    check_dims(parse("na(window=7)"), 3, "M")
    model, _ = tiny_models.wan()
    with pytest.raises(ValueError, match="WanTransformer3DModel are a"):
        visattn.apply(model, "na(window=7x7)")
