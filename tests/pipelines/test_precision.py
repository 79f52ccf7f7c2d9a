"""apply(precision=): which calls are in 8 bits, layers and steps that stay precise, what the report says."""

import pytest
import torch

import visattn
from tests.support import tiny_flux, tiny_pipelines
from visattn.schedule import Schedule

PATTERN = "na(window=3x3)"
SITES = 4
OPTIONS = {"height": 24, "width": 16}


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipelines.stable_diffusion()[0]
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe, steps=2):
    made = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=steps, generator=made, output_type="latent", **OPTIONS).images


def precisions(handle):
    """Calls in 8 bits and others, of each site."""
    found = {}
    for site in handle.report().sites:
        eight = sum(call.hits for call in site.calls if call.problem.precision is not None)
        found[site.site] = eight, site.hits - eight
    return list(found.values())


def test_every_call_is_rounded_and_the_report_says_so(pipe):
    with visattn.apply(pipe, PATTERN) as handle:
        own = run(pipe)
    with visattn.apply(pipe, PATTERN, precision="int8") as handle:
        ours = run(pipe)
        report = handle.report()
    assert precisions(handle) == [(2, 0)] * SITES
    assert not own.equal(ours) and torch.nn.functional.cosine_similarity(own.flatten(), ours.flatten(), 0) > 0.99
    assert "tiles in int8, simulated for its errors on" in str(report)
    assert {site["precision"] for site in report.to_dict()["sites"]} == {"int8"}


def test_layers_and_steps_stay_precise(pipe):
    with visattn.apply(
        pipe, PATTERN, precision="fp8", precise_steps=1, precise_last_steps=1, precise_layers="1"
    ) as handle:
        run(pipe, 4)
    assert precisions(handle) == [(2, 2), (0, 4), (2, 2), (2, 2)]
    with visattn.apply(pipe, PATTERN, precision="fp8", precise_layers="0-3") as handle:
        ours = run(pipe)
    with visattn.apply(pipe, PATTERN):
        assert run(pipe).equal(ours)


def test_calls_that_8_bits_would_slow_down_are_exact_and_counted(pipe, monkeypatch):
    """On a GPU; here somebody says so."""
    for place in ("runtime.verdict", "report"):
        monkeypatch.setattr(f"visattn.{place}.slower_in_8_bits", lambda problem: "why" if problem.precision else "")
    with visattn.apply(pipe, PATTERN) as handle:
        own = run(pipe)
    with visattn.apply(pipe, PATTERN, precision="int8") as handle:
        ours, report = run(pipe), handle.report()
    assert ours.equal(own) and precisions(handle) == [(0, 2)] * SITES
    assert report.exact == report.to_dict()["exact"] == 2 * SITES and not report.fallbacks and not report.dense
    assert all(site.exact == {f"why on {site.calls[0].problem.layout}": 2} for site in report.sites)
    assert "2 calls each not computed in 8 bits: why on" in str(report) and "simulated" not in str(report)
    with visattn.apply(pipe, PATTERN, precision="int8", always=True) as handle:
        run(pipe)
    assert precisions(handle) == [(2, 0)] * SITES and not handle.report().exact


def test_a_pattern_that_covers_the_grid_is_rounded_too(pipe):
    with visattn.apply(pipe, "na(window=-1x-1)", precision="int8", layers="0") as handle:
        run(pipe, 1)
    assert precisions(handle) == [(1, 0)]


def test_compiled_code_tells_layers_of_another_precision_apart():
    model, _ = tiny_flux.flux(single=1)
    with visattn.apply(model, PATTERN, precision="int8", precise_layers="1") as handle:
        first, second = (site.group for site in handle._patches[0].sites)
        assert (first.precision, second.precision) == ("int8", None)
        assert first.number != second.number and first.unnamed != second.unnamed


def test_refusals(pipe):
    for options, message in (
        ({"precision": "fp4"}, r"precision='fp4' must be None or one of"),
        ({"precise_steps": 2}, "are what a precision leaves out: pass precision= too"),
        ({"precision": "int8", "precise_layers": "9-"}, "selects nothing"),
        ({"precision": "int8", "precise_steps": -1}, "precise_steps=-1 must be a count"),
    ):
        with pytest.raises(ValueError, match=message):
            visattn.apply(pipe, PATTERN, **options)
    with pytest.raises(ValueError, match=r"is for patterns that list key tiles, which linear"):
        visattn.apply(pipe, "linear()", precision="int8")


def test_stages_are_rounded_but_for_dense_and_precise_steps(pipe):
    staged = {"0-": {"0": "dense", "1-2": PATTERN, "3-": "clear(radius=2)"}}
    with visattn.apply(pipe, staged, precision="int8", precise_steps=2, precise_layers="1") as handle:
        run(pipe, 4)
        report = handle.report()
    assert precisions(handle) == [(2, 1), (0, 3), (2, 1), (2, 1)]
    found = {(str(c.problem.pattern), c.problem.precision, c.hits) for c in report.sites[0].calls}
    assert found == {(PATTERN, None, 1), (PATTERN, "int8", 1), ("clear(radius=2)", "int8", 1)}
    assert "steps 3-: clear(radius=2), 1 hit, tiles in int8, simulated for its errors on" in str(report)
    with pytest.raises(ValueError, match="is for patterns that list key tiles, which linear"):
        visattn.apply(pipe, {"0-": {"0": PATTERN, "1-": "linear()"}}, precision="int8")


def test_a_schedule_keeps_its_precision(pipe):
    schedule = Schedule.of(PATTERN, precision="fp8", precise_layers="1", precise_steps=1, precise_last_steps=1)
    with visattn.apply(pipe, schedule) as handle:
        run(pipe, 4)
    assert precisions(handle) == [(2, 2), (0, 4), (2, 2), (2, 2)]


@pytest.mark.parametrize("how", ["ulysses", "halo"])
def test_8_bits_are_refused_where_processes_share_tokens(how):
    model, _ = tiny_flux.flux(single=1)
    with pytest.raises(ValueError, match=f"parallel='{how}' and precision='int8': attention that processes share"):
        visattn.apply(model, PATTERN, parallel=how, precision="int8")
    with pytest.raises(ValueError, match="precision='fp8': attention that processes share"):
        visattn.apply(model, Schedule.of(PATTERN, precision="fp8"), parallel=how)


def test_training_is_refused_with_the_reason():
    model, inputs = tiny_flux.flux(single=1)
    with visattn.apply(model, PATTERN, precision="int8"), pytest.raises(ValueError, match="has no gradient"):
        model(**inputs)
