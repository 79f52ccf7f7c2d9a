"""Estimated times of the Triton kernels against those that were measured."""

import json
import re

import pytest
import torch

pytest.importorskip("triton")

from tests.support.places import ROOT
from visattn import Layout, parse
from visattn.dispatch import Problem
from visattn.kernels.triton import backend as engine
from visattn.kernels.triton.choosing.cost import choosing_us
from visattn.kernels.triton.estimate import CALL, GPUS, estimate

MEASURED = {gpu: json.loads((ROOT / f"docs/results/{gpu}.json").read_text()) for gpu in ("h100", "h200")}
CASES = [(gpu, name) for gpu, found in MEASURED.items() for name in found["cases"] if "routing" not in name]


def layout_of(text):
    dense = {name: int(number) for name, number in re.findall(r"(prefix|suffix) (\d+)", text)}
    return Layout(tuple(map(int, text.split(",")[0].split("x"))), **dense)


@pytest.mark.parametrize(("gpu", "name"), CASES)
def test_is_near_what_was_measured(gpu, name):
    found = MEASURED[gpu]
    case, sizes = found["cases"][name], {"heads": found["heads"], "head_dim": found["dim"]}
    expected = estimate(case["pattern"], layout_of(case["layout"]), gpu, **sizes)
    assert expected.kernel == ("hopper" if case["config"]["forward"][5] else "general")
    assert expected.milliseconds == pytest.approx(case["triton"]["forward_ms"], rel=0.22)
    assert expected.tile_bound == pytest.approx(case["tile_bound"])


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_says_where_its_rates_come_from(gpu):
    one = estimate("na(window=9x9)", Layout((64, 64)), gpu, heads=8, head_dim=64)
    two = estimate("na(window=9x9)", Layout((64, 64)), gpu, heads=16, head_dim=64)
    assert two.milliseconds - CALL == pytest.approx(2 * (one.milliseconds - CALL))
    assert "measured on" in one.basis if gpu in MEASURED else "assumed" in one.basis
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


RESULTS = ROOT / "docs" / "results"
DYNAMIC = {
    name: case
    for file in ("h200-dynamic", "h200-dynamic-skip")
    for name, case in json.loads((RESULTS / f"{file}.json").read_text())["cases"].items()
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_cost_of_a_dynamic_pattern_is_near_what_was_measured(name):
    case = DYNAMIC[name]
    pattern, layout = parse(case["pattern"]), Layout(tuple(int(n) for n in case["layout"].split("x")))
    problem = Problem(pattern, layout, 1, 24, 24, 128, torch.bfloat16, "cuda", mode="captured")
    expected, chosen = engine.backend.cost(problem) / problem.dense_pairs, choosing_us(problem)
    # The dense rate of the rule is that of an H100.
    measured = case["ours"]["forward_ms"] / case["cudnn"]["forward_ms"]
    if name.startswith("small"):
        # The host kept the device waiting, which a captured call does not.
        assert expected < measured
        assert chosen < 1e3 * case["parts_ms"]["choosing_and_lists"]
        return
    # How many blocks topp lists depends on scores, which were those of noise.
    assert case["pattern"].startswith("topp") or expected == pytest.approx(measured, rel=0.22)
    assert chosen == pytest.approx(1e3 * case["parts_ms"]["choosing_and_lists"], rel=0.22)
