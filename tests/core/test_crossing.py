"""Where `auto` leaves attention dense: the estimates agree with what was measured, and hold where they are used."""

import json
import re
from dataclasses import replace

import pytest
import torch

import visattn
from tests.support.places import ROOT
from visattn import Layout, dispatch, parse
from visattn import crossing as crossings
from visattn.attend import Explanation
from visattn.crossing import crossing, slower_in_8_bits
from visattn.dispatch import milliseconds, overhead, wall
from visattn.kernels import natten
from visattn.kernels.triton.backend import backend as triton
from visattn.problem import Problem, Support
from visattn.runtime.verdict import judge

ROWS = json.loads((ROOT / "docs/results/h200-calls.json").read_text())["rows"]
EIGHT = json.loads((ROOT / "docs/results/gpu-eightbit.json").read_text())["cases"].values()
ON_CPU = json.loads((ROOT / "docs/results/cpu-crossing.json").read_text())["rows"]
TAKEN = json.loads((ROOT / "docs/results/h200-crossing.json").read_text())["rows"]


def problem(pattern="na(window=9x9)", grid=(64, 64), heads=24, dim=128, **rest):
    options = {"batch": 1, "kv_heads": heads, "dtype": torch.bfloat16, "device": "cuda"} | rest
    return Problem(parse(pattern), Layout(grid), heads=heads, head_dim=dim, **options)


def measured(row):
    """The call that a row of prepared_gpu timed."""
    heads, dim = (int(n) for n in re.fullmatch(r"(\d+).*? x (\d+)", row["heads"]).groups())
    sides = {"prefix": 0, "suffix": 0}
    grid = re.search(r"\d+x\d+", row["layout"])[0]
    for name in sides:
        found = re.search(rf"{name} (\d+)", row["layout"])
        sides[name] = int(found[1]) if found else 0
    layout = Layout(tuple(map(int, grid.split("x"))), **sides)
    batch = 2 if dim == 72 else 1
    return Problem(parse(row["pattern"]), layout, batch, heads, heads, dim, torch.bfloat16, "cuda")


@pytest.fixture
def only_engines(monkeypatch):
    """Triton and torch, as on a GPU without further packages."""
    engines = [triton, dispatch.load("sdpa")]
    monkeypatch.setattr("visattn.crossing.choose", lambda problem: min(engines, key=lambda each: each.cost(problem)))
    crossing_of = __import__("visattn.crossing", fromlist=["_crossing"])._crossing
    crossing_of.cache_clear()
    yield
    crossing_of.cache_clear()


@pytest.fixture
def only_triton(monkeypatch):
    """Choices as on a GPU without further packages."""
    monkeypatch.setattr("visattn.crossing.choose", lambda _: triton)
    kept = [getattr(crossings, name) for name in ("_crossing", "_slower_in_8_bits")]
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_the_choice_is_within_a_tenth_of_the_faster_one_measured(row, only_triton):
    found = crossing(measured(row))
    times = row["sdpa_wall_us"], row["wall_us"]
    assert times[0 if found.dense_pays else 1] <= 1.1 * min(times)


@pytest.mark.parametrize("row", [row for row in ROWS if row["case"] != "gqa"], ids=lambda row: row["case"])
def test_estimates_are_within_half_of_what_was_measured(row, only_triton):
    found = crossing(measured(row))
    assert 0.5 < 1e3 * found.dense_ms / row["sdpa_wall_us"] < 2
    assert 0.5 < 1e3 * found.sparse_ms / row["wall_us"] < 2


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: "{model} {side} {pattern} {mode}".format(**row))
def test_the_choice_holds_on_either_side_of_the_crossing(row, only_engines):
    """Eager within a tenth; of calls of some 20 us, as captured ones are, an estimate can tell less."""
    shape = row["batch"], row["heads"], row["heads"], row["dim"]
    layout = Layout((row["side"], row["side"]))
    found = crossing(Problem(parse(row["pattern"]), layout, *shape, torch.bfloat16, "cuda", mode=row["mode"]))
    taken, other = row["dense_us"], row["sparse_us"]
    if not found.dense_pays:
        taken, other = other, taken
    assert taken <= 1.1 * other or (row["mode"] == "captured" and taken - other < 5)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("row", EIGHT, ids=lambda row: "{pattern} on {layout}, {head_dim}".format(**row))
def test_8_bits_are_left_out_where_they_take_longer(row, precision, only_triton):
    grid, prefix = re.search(r"\d+(x\d+)+", row["layout"])[0], re.search(r"prefix (\d+)", row["layout"])
    layout = Layout(tuple(map(int, grid.split("x"))), prefix=int(prefix[1]) if prefix else 0)
    call = Problem(parse(row["pattern"]), layout, 1, 24, 24, row["head_dim"], torch.bfloat16, "cuda")
    why = slower_in_8_bits(replace(call, precision=precision))
    assert row["ms"]["bf16" if why else precision] <= 1.05 * min(row["ms"]["bf16"], row["ms"][precision])
    assert bool(why) == bool(re.fullmatch(rf"estimated [\d.]+ ms in {precision}, quantising included, .* without", why))


def test_nobody_overrules_8_bits_that_were_not_timed(only_triton, monkeypatch):
    small = problem("na(window=24x24,stride=8x8)", precision="int8")
    assert slower_in_8_bits(small)
    for other in (replace(small, precision=None), replace(small, device="cpu"), replace(small, grad=True)):
        assert not slower_in_8_bits(other)
    crossings._slower_in_8_bits.cache_clear()
    monkeypatch.setattr("visattn.kernels.triton.backend._architecture_or_common", lambda: 80)
    assert not slower_in_8_bits(small)


def test_a_verdict_says_why_8_bits_were_left_out(only_triton, monkeypatch):
    monkeypatch.setattr("visattn.runtime.verdict.choose", lambda problem, backend: triton)
    small = problem("na(window=24x24,stride=8x8)", (96, 96), precision="fp8")
    large = problem("na(window=80x80,stride=16x16)", (256, 256), precision="fp8")

    def judged(one, backend="auto", always=False):
        return judge(one.pattern, (one,), (one.layout,), backend, always)

    found = judged(small)
    assert (found.kind, found.precision, found.problems) == ("sparse", None, (small,))
    assert re.fullmatch(r"estimated [\d.]+ ms in fp8, quantising included, [\d.]+ ms without", found.exact)
    for other in (judged(large), judged(small, "triton"), judged(small, always=True)):
        assert other.precision == "fp8" and not other.exact
    # What covers the grid is the model's own attention, unless it is rounded.
    whole = judged(problem("na(window=-1x-1)", (32, 32), precision="fp8"))
    assert whole.exact and not whole.layouts and whole.kind == "sparse"
    # Where dense attention is faster than both, it runs.
    dense = judged(problem("na(window=31x31)", (32, 32), precision="fp8"))
    assert dense.slower and dense.kind == "dense" and dense.problems[0].precision is None


def test_a_captured_call_costs_no_host_and_an_operator_costs_more(only_triton):
    small = problem(grid=(32, 32), heads=12, dim=64)
    times = {mode: crossing(replace(small, mode=mode)) for mode in ("captured", "eager", "compiled")}
    assert times["captured"].sparse_ms < times["eager"].sparse_ms < times["compiled"].sparse_ms
    assert times["compiled"].dense_ms < times["eager"].dense_ms
    assert times["compiled"].dense_pays and "(compiled)" in str(times["compiled"])


def test_a_model_keeps_dense_what_saves_the_device_less_than_it_costs_the_host(only_triton):
    """SDXL at 1024 pixels waits for its host, at 2048 for the device: 32x32 and 64x64 tokens, and 128x128."""
    small, middle, large = (
        problem("na(window=16x16,stride=8x8)", (n, n), h, 64, batch=2) for n, h in ((32, 20), (64, 10), (128, 10))
    )
    assert crossing(small).dense_pays_inside and crossing(middle).dense_pays_inside
    assert not crossing(large).dense_pays_inside
    assert crossing(large).saved_ms > 0.14 > crossing(middle).saved_ms > 0.07 > crossing(small).saved_ms
    assert not crossing(replace(large, mode="captured")).dense_pays_inside
    held = replace(crossing(small), dense_ms=1.0)
    assert "less than 2 times what a call in a model costs the host (0.07 ms)" in held.reason and not held.dense_pays


def test_large_calls_cost_the_same_however_they_are_made(only_triton):
    large = problem("na(window=32x32,stride=8x8)", (256, 256))
    assert len({crossing(replace(large, mode=m)).sparse_ms for m in ("eager", "compiled", "captured")}) == 1


@pytest.mark.parametrize(
    "other",
    [
        problem(grad=True),
        problem("linear"),
        problem("agent(agents=4x4)"),
        problem(device="cpu", grad=True),
        problem(device="cpu", precision="int8"),
        problem(device="xpu"),
    ],
)
@pytest.mark.crossing
def test_nothing_is_left_dense_where_the_pattern_must_run(other):
    assert crossing(other) is None


def test_wall_time_is_the_longer_of_device_and_host():
    call = problem()
    hundred = overhead(call, 0, 100)
    assert wall(call, hundred / 2, 1, 100) == hundred and wall(call, hundred * 2, 1, 100) == hundred * 2
    assert milliseconds(call, hundred) == pytest.approx(0.1)
    on_cpu = replace(call, device="cpu")
    assert wall(on_cpu, 5.0, 1, 100) == 5.0 + overhead(on_cpu, 1, 0)


@pytest.mark.parametrize("pattern", ["na(window=9x9)", "na(window=13x13)", "na(window=16x16,stride=8x8)"])
def test_natten_costs_its_own_tiles_copies_and_host(pattern, monkeypatch):
    monkeypatch.setattr(natten, "_eager", lambda _: False)
    call = problem(pattern, (96, 96))
    assert natten.own_tiles(call).queries.capacity == natten.own_tiles(call).keys.capacity == 128
    # 0.49 ms on the device and 1.9 ms by the wall clock were measured at this size, against 0.18 and 0.77 ms of ours.
    captured = replace(call, mode="captured")
    assert 0.3 < milliseconds(call, natten.backend.cost(captured)) < 0.7
    assert milliseconds(call, natten.backend.cost(call)) >= 1.4
    assert triton.cost(captured) < natten.backend.cost(captured)
    assert triton.cost(call) < natten.backend.cost(call)


@pytest.mark.gpu
def test_choices_on_this_gpu_are_within_a_tenth_of_the_faster_one():
    from scripts.check import crossing_gpu

    with torch.no_grad():
        rows = [
            crossing_gpu.measure(shape, pattern, "eager")
            for shape in crossing_gpu.SHAPES
            for pattern in crossing_gpu.PATTERNS
        ]
    assert [row for row in rows if not row["right"]] == []


@pytest.mark.parametrize(
    ("sparse", "dense", "said"),
    [
        (10.117, 10.126, "estimated 10.117 ms by tiles, 10.126 ms dense: nearer than estimates can tell (5%)"),
        (10.2, 10.1, "estimated 10.200 ms by tiles, 10.100 ms dense"),
    ],
)
def test_why_a_pattern_that_looks_faster_is_left_is_said(sparse, dense, said):
    found = crossings.Crossing("tiles", sparse, dense, "eager", device="cpu")
    assert found.dense_pays and found.reason == said


def test_an_explanation_of_a_gpu_call_has_both_estimates(only_triton):
    small = problem(grid=(32, 32), heads=12, dim=64)
    both = tuple(dispatch.Candidate(each, Support(True), each.cost(small)) for each in (triton, dispatch.load("sdpa")))
    text = str(Explanation(small, "sdpa", both))
    assert re.search(
        r"estimated 0\.\d{3} ms by triton, 0\.\d{3} ms dense \(compiled\); apply\(\) leaves the model's own", text
    )
    assert "leaves" not in str(Explanation(problem("na(window=16x16,stride=8x8)"), "triton", both))
    assert " ms dense" not in str(Explanation(replace(small, device="cpu", grad=True), "sdpa", both))


@pytest.fixture
def threads():
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_cpu(row):
    torch.set_num_threads(row["threads"])
    shape = row["batch"], row["heads"], row["heads"], row["dim"]
    layout = Layout(tuple(row["grid"]), suffix=row["suffix"])
    return crossing(Problem(parse(row["pattern"]), layout, *shape, getattr(torch, row["dtype"]), "cpu"))


def case(row):
    grid = "x".join(map(str, row["grid"]))
    return "{pattern} {batch} {dim} {dtype} {threads}".format(**row).replace(" ", f" {grid} ", 1)


@pytest.mark.crossing
@pytest.mark.parametrize("row", ON_CPU, ids=case)
def test_the_choice_on_a_cpu_holds_on_either_side_of_the_crossing(row, threads):
    """What runs takes 15 % longer than dense attention at most; what is kept dense would not save a third of it."""
    ratio = row["sparse_ms"] / row["dense_ms"]
    assert ratio > 0.7 if on_cpu(row).dense_pays_inside else ratio < 1.15


@pytest.mark.crossing
def test_nearly_all_choices_on_a_cpu_are_within_15_percent_of_the_faster_one(threads):
    wrong = [row for row in ON_CPU if on_cpu(row).dense_pays_inside and row["sparse_ms"] < 0.85 * row["dense_ms"]]
    assert len(ON_CPU) >= 90 and len(wrong) <= 0.05 * len(ON_CPU)


@pytest.mark.crossing
def test_a_model_on_a_cpu_waits_for_no_host_and_more_threads_need_more_tokens(threads):
    few = problem(grid=(24, 24), heads=4, dim=64, dtype=torch.float32, device="cpu")
    saved = []
    for number in (1, 2, 64):
        torch.set_num_threads(number)
        found = crossing(few)
        saved.append(found.sparse_ms / found.dense_ms)
        assert found.dense_pays_inside == found.dense_pays == (number == 64)
        assert found.reason == str(found)
        assert crossing(replace(few, mode="captured")).dense_pays == found.dense_pays
    assert saved == sorted(saved)


@pytest.mark.crossing
def test_an_explanation_of_a_cpu_call_has_both_estimates_once():
    for grid, kept in (((8, 8), True), ((64, 64), False)):
        text = str(visattn.explain("na(window=3x3)", Layout(grid), torch.zeros(1, grid[0] ** 2, 2, 32)))
        assert len(re.findall(r"estimated [\d.]+ ms by \w+, [\d.]+ ms dense", text)) == 1
        assert ("apply() leaves the model's own dense attention here" in text) == kept


def test_patterns_that_choose_do_not_run_under_a_mask_on_a_cpu_where_tiles_are_faster():
    """24x24 tokens, 8 heads of 64: 23 ms under a mask, 6 in tiles, 8.5 dense on one thread."""
    call = problem("topk(keep=0.15)", (24, 24), 8, 64, dtype=torch.float32, device="cpu")
    assert dispatch.choose(call).name == "tiles"
