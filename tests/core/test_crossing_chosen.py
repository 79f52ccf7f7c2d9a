"""What choosing lists costs on a CPU, and what is said of lists that are known: as measured, and part by part."""

import json
from dataclasses import replace

import pytest
import torch

from tests.core.test_crossing import problem
from tests.support.places import ROOT
from visattn import Layout, dispatch, parse
from visattn.crossing import crossing, dense_cost
from visattn.problem import Problem

CHOSEN_ON_CPU = json.loads((ROOT / "docs/results/cpu-crossing-chosen.json").read_text())["rows"]


@pytest.fixture(autouse=True)
def threads():
    """One thread; puts their number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_cpu(row, **given):
    torch.set_num_threads(row["threads"])
    shape = row["batch"], row["heads"], row["heads"], row["dim"]
    layout = Layout(tuple(row["grid"]), suffix=row["suffix"])
    return crossing(Problem(parse(row["pattern"]), layout, *shape, getattr(torch, row["dtype"]), "cpu", **given))


def case(row):
    grid, smooth = "x".join(map(str, row["grid"])), " smooth" * row["smooth"]
    return "{pattern} {grid} {batch} {dim} {dtype} {smooth}".format(**{**row, "grid": grid, "smooth": smooth})


@pytest.mark.crossing
@pytest.mark.parametrize("row", CHOSEN_ON_CPU, ids=case)
def test_what_runs_of_lists_that_are_chosen_is_hardly_slower_than_dense_attention(row):
    """Every score, rest, test and size of blocks has its price; lists longer than expected are weighed once more."""
    found, ratio = on_cpu(row), row["sparse_ms"] / row["dense_ms"]
    if found.dense_pays_inside:
        assert ratio > 0.7
    elif "listed" in row:
        # What is left to dense attention when its lists are made costs these.
        assert on_cpu(row, listed=row["listed"]).dense_pays_inside
        assert row["applied_ms"] < 1.4 * row["dense_ms"]
    else:
        assert ratio < 1.15


@pytest.mark.crossing
def test_few_choices_of_lists_on_a_cpu_are_wrong():
    wrong = [row for row in CHOSEN_ON_CPU if row["dense_ms"] > 1.3 * row["sparse_ms"] and on_cpu(row).dense_pays_inside]
    slow = [row for row in CHOSEN_ON_CPU if row.get("applied_ms", 0) > 1.25 * row["dense_ms"]]
    assert len(CHOSEN_ON_CPU) > 50 and len(wrong + slow) <= 0.05 * len(CHOSEN_ON_CPU)


@pytest.mark.parametrize(
    "dearer",
    [
        "score=lowbit(4)",
        "score=diagonal(4)",
        "score=parts(16x16)",
        "score=bounds",
        "skip=0.01",
        "alike=0.6",
        "rest=slope",
        "rest=linear",
        "rest=coarse",
        "block=2x2",
    ],
)
@pytest.mark.parametrize("name", ["tiles", "sdpa"])
def test_what_a_choice_costs_beside_its_lists_is_in_estimates(name, dearer):
    def cost(text):
        call = problem(text, (32, 32), 4, 64, dtype=torch.float32, device="cpu")
        return dispatch.load(name).cost(call)

    plain = cost("topk(keep=0.15, rest=mean)" if "slope" in dearer and name == "tiles" else "topk(keep=0.15)")
    assert cost(f"topk(keep=0.15, {dearer})") > plain


def test_small_blocks_of_keys_leave_tiles_of_queries_whole():
    """Tiles of 8 queries took twice the time."""
    costs = [
        dispatch.load("tiles").cost(problem(text, (64, 64), 4, 64, dtype=torch.float32, device="cpu"))
        for text in ("topk(keep=0.15, block=8x8, key_block=2x4)", "topk(keep=0.15, block=8x8)")
    ]
    assert costs[0] < 1.3 * costs[1]


@pytest.mark.crossing
def test_choosing_shares_threads_less_well_than_products_do():
    call = problem("topk(keep=0.15, score=bounds)", (32, 32), 4, 64, dtype=torch.float32, device="cpu")
    shares = []
    for number in (1, 2, 8):
        torch.set_num_threads(number)
        shares.append(crossing(call).sparse_ms / crossing(call).dense_ms)
    assert shares[0] + 0.2 < shares[1] < shares[2]
    assert dispatch.choose(call).name == "tiles"


def test_lists_that_are_known_cost_what_they_visit():
    call = problem("topp(p=0.9)", (64, 64), 4, 64, dtype=torch.float32, device="cpu")
    costs = [dispatch.load("tiles").cost(replace(call, listed=share)) for share in (0.1, 0.5, 1.0)]
    assert costs[2] - costs[1] == pytest.approx(1.25 * (costs[1] - costs[0]), rel=0.1)
    assert costs[0] < dispatch.load("tiles").cost(call) < costs[1] < dense_cost(call) < costs[2]


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("lsh", "lsh(samples=0)"),
        ("kmeans(queries=64, keys=64, step=20)", "kmeans(queries=64, keys=64)"),
        ("gate(by=topk(keep=0.15))", "topk(keep=0.15)"),
        ("best(of=[na(window=9x9), clear(radius=5)], rows=64)", "best(of=[na(window=9x9), clear(radius=5)], rows=8)"),
    ],
)
def test_what_goes_before_lists_is_in_estimates_of_patterns_around_them(pattern, plain):
    costs = []
    for text in (pattern, plain):
        call = problem(text, (32, 32), 4, 64, dtype=torch.float32, device="cpu")
        costs.append(dispatch.choose(call).cost(call) / dense_cost(call))
    assert costs[0] > costs[1] + 0.15
