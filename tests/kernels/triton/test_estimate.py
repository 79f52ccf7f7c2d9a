"""Estimated times of the Triton kernels against the measured ones in docs/results/h100.json."""

import json
import re

import pytest

pytest.importorskip("triton")

from tests.support.places import ROOT
from visattn import Layout
from visattn.kernels.triton.estimate import CALL, GPUS, estimate

MEASURED = json.loads((ROOT / "docs/results/h100.json").read_text())


def layout_of(text):
    dense = {name: int(number) for name, number in re.findall(r"(prefix|suffix) (\d+)", text)}
    return Layout(tuple(map(int, text.split(",")[0].split("x"))), **dense)


@pytest.mark.parametrize("name", [name for name, case in MEASURED["cases"].items() if "routing" not in case["pattern"]])
def test_is_near_what_was_measured(name):
    case = MEASURED["cases"][name]
    expected = estimate(case["pattern"], layout_of(case["layout"]), heads=MEASURED["heads"], head_dim=MEASURED["dim"])
    assert expected.kernel == ("hopper" if case["config"]["forward"][5] else "general")
    assert expected.milliseconds == pytest.approx(case["triton"]["forward_ms"], rel=0.3)
    assert expected.tile_bound == pytest.approx(case["tile_bound"])


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_says_where_its_rates_come_from(gpu):
    one = estimate("na(window=9x9)", Layout((64, 64)), gpu, heads=8, head_dim=64)
    two = estimate("na(window=9x9)", Layout((64, 64)), gpu, heads=16, head_dim=64)
    assert two.milliseconds - CALL == pytest.approx(2 * (one.milliseconds - CALL))
    assert "measured on" in one.basis if gpu == "h100" else "assumed" in one.basis
    assert one.to_dict()["ratio"] == pytest.approx(one.dense_milliseconds / one.milliseconds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "v100"}, "gpu 'v100' has no record: pass one of h100"),
        ({"head_dim": 512}, "head_dim 512 is not from 1 to 256"),
        ({"pattern": "mala"}, "composition and no list"),
    ],
)
def test_says_what_it_cannot_estimate(given, message):
    with pytest.raises(ValueError, match=message):
        estimate(**({"pattern": "na(window=9x9)", "layout": Layout((64, 64))} | given))
