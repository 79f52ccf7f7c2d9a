"""The patched site: what was decided for a call holds for calls like it and no others, and costs the host little."""

import gc
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

import visattn
from tests.support import tiny_models
from tests.support.places import ROOT
from visattn.crossing import Crossing
from visattn.runtime.runner import Runner
from visattn.tally import Tally

PATTERN = "na(window=3x3)"
GPU = torch.device("cuda")


@pytest.fixture
def looked_at(monkeypatch):
    """Calls of attention that were decided anew, by module."""
    seen = []
    fit = Runner.fit

    def spy(self, call):
        seen.append(self.run.site)
        return fit(self, call)

    monkeypatch.setattr(Runner, "fit", spy)
    return seen


@pytest.fixture
def dense_pays(monkeypatch):
    """As on a GPU where dense attention is the faster one."""
    found = Crossing("triton", 0.105, 0.082, "eager")
    monkeypatch.setattr("visattn.runtime.verdict.crossing", lambda problem: found)
    monkeypatch.setattr("visattn.call_report.crossing", lambda problem: found)


@pytest.mark.parametrize("make", [tiny_models.sdxl, tiny_models.flux, tiny_models.wan])
@pytest.mark.parametrize("pattern", ["dense", "na"])
def test_calls_that_are_alike_are_decided_once_and_give_the_same_bits(make, pattern, looked_at):
    model, inputs = make()
    if pattern == "na":
        pattern = "na(window=3x3x3)" if make is tiny_models.wan else PATTERN
    with visattn.apply(model, pattern, backend="auto") as handle:
        first = tiny_models.run(model, inputs)
        decided = len(looked_at)
        assert 0 < decided < len(handle.report().modules) or len(handle.report().modules) == decided
        again = [tiny_models.run(model, inputs) for _ in range(3)]
        report = handle.report()
    assert len(looked_at) == decided
    assert all(torch.equal(first, out) for out in again)
    calls = 4 * len(report.modules)
    assert (report.hits, report.dense) == ((0, calls) if pattern == "dense" else (calls, 0))
    with visattn.apply(model, pattern), torch.autocast("cpu", enabled=False):
        assert torch.equal(first, tiny_models.run(model, inputs))


def test_other_steps_grids_dtypes_and_backends_are_decided_anew(looked_at):
    model, inputs = tiny_models.sdxl()
    other = {**inputs, "sample": inputs["sample"][..., :-4]}
    with visattn.apply(model, PATTERN, dense_steps=1) as handle:
        handle.set_step(0, 3)
        dense = tiny_models.run(model, inputs)
        handle.set_step(1, 3)
        sparse = tiny_models.run(model, inputs)
        assert not torch.equal(dense, sparse)
        before = len(looked_at)
        handle.set_step(0, 3)
        assert torch.equal(dense, tiny_models.run(model, inputs))
        handle.set_step(2, 3)
        assert torch.equal(sparse, tiny_models.run(model, inputs))
        assert len(looked_at) == before
        tiny_models.run(model, other)
        assert len(looked_at) > before
        grids = {call.problem.layout.grid for site in handle.report().modules for call in site.calls}
    assert len(grids) >= 2


def test_a_watcher_sees_every_call_from_when_it_is_set(looked_at):
    model, inputs = tiny_models.sdxl()
    seen = []
    with visattn.apply(model, PATTERN) as handle:
        tiny_models.run(model, inputs)
        handle.watch(seen.append)
        tiny_models.run(model, inputs)
        assert len(seen) == len(handle.report().modules)
        handle.watch(None)
        tiny_models.run(model, inputs)
    assert len(seen) == len(handle.report().modules)


def test_gradients_are_decided_apart_and_flow():
    model, inputs = tiny_models.sdxl()
    with visattn.apply(model, PATTERN) as handle:
        with torch.no_grad():
            tiny_models.run(model, inputs)
        sample = inputs["sample"].clone().requires_grad_()
        for _ in range(2):
            out = model(**{**inputs, "sample": sample}, return_dict=False)[0]
            (found,) = torch.autograd.grad(out.square().sum(), sample)
        assert found.abs().sum() > 0
        problems = {call.problem.grad for site in handle.report().modules for call in site.calls}
    assert problems == {False, True}


def test_auto_keeps_dense_what_would_be_slower_and_says_so(dense_pays):
    model, inputs = tiny_models.sdxl()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, PATTERN) as handle:
        with pytest.warns(UserWarning, match="no attention module .* estimated 0.105 ms by triton, 0.082 ms dense"):
            kept = tiny_models.run(model, inputs)
        assert torch.equal(kept, tiny_models.run(model, inputs))
        report = handle.report()
    assert torch.equal(kept, stock)
    sites = len(report.modules)
    assert (report.hits, report.dense, report.kept, report.fallbacks) == (0, 2 * sites, 2 * sites, {})
    assert "2 calls each kept dense: estimated 0.105 ms by triton, 0.082 ms dense on" in " ".join(str(report).split())
    assert report.to_dict()["kept"] == 2 * sites


@pytest.mark.parametrize("options", [{"always": True}, {"strict": True}, {"backend": "sdpa"}])
def test_the_pattern_runs_where_it_must(options, dense_pays):
    model, inputs = tiny_models.sdxl()
    with visattn.apply(model, PATTERN, **options) as handle:
        tiny_models.run(model, inputs)
        report = handle.report()
    assert report.hits == len(report.modules) and report.kept == 0


def test_modules_kept_dense_are_not_missed_beside_others(monkeypatch):
    found = Crossing("triton", 0.105, 0.082, "eager")
    small = {}

    def crossing(problem):
        small.setdefault("grid", problem.layout.grid)
        return found if problem.layout.grid == small["grid"] else None

    monkeypatch.setattr("visattn.runtime.verdict.crossing", crossing)
    model, inputs = tiny_models.sd15()
    with visattn.apply(model, PATTERN) as handle:
        tiny_models.run(model, inputs)
        report = handle.report()
    assert report.hits > 0 and report.kept > 0 and report.hits + report.kept == len(report.modules)


def function_calls(model, inputs):
    """Python functions that one step calls."""
    seen = Counter()

    def count(frame, event, argument):
        if event == "call":
            seen[frame.f_code.co_name] += 1

    # What the collector calls for garbage of other tests is not the model's.
    gc.disable()
    sys.setprofile(count)
    try:
        tiny_models.run(model, inputs)
    finally:
        sys.setprofile(None)
        gc.enable()
    return sum(seen.values())


@pytest.mark.parametrize(
    ("make", "once", "most"), [(tiny_models.sdxl, 0, 0), (tiny_models.flux, 70, 20), (tiny_models.wan, 70, 20)]
)
def test_a_dense_model_calls_few_more_functions_than_stock(make, once, most):
    """A UNet fewer: what diffusers works out at each call is kept. Others have a hook at each module."""
    model, inputs = make()
    tiny_models.run(model, inputs)
    stock = function_calls(model, inputs)
    with visattn.apply(model, "dense") as handle:
        for _ in range(2):
            tiny_models.run(model, inputs)
        patched = function_calls(model, inputs)
        sites = len(handle.report().modules)
    assert patched - stock <= once + most * sites


@pytest.mark.parametrize(("make", "most"), [(tiny_models.sdxl, 7), (tiny_models.flux, 9)])
def test_a_dense_call_adds_few_function_calls(make, most):
    files = ("dispatch", "stock", "runner", "verdict", "tally", "autocast", "call", "forward", "sequences")
    model, inputs = make()
    with visattn.apply(model, "dense") as handle, torch.no_grad():
        tiny_models.run(model, inputs)
        tiny_models.run(model, inputs)
        calls = Counter()

        def count(frame, event, argument):
            path = Path(frame.f_code.co_filename)
            if event == "call" and path.stem in files and ROOT in path.parents:
                calls[frame.f_code.co_qualname] += 1

        sys.setprofile(count)
        try:
            tiny_models.run(model, inputs)
        finally:
            sys.setprofile(None)
        sites = len(handle.report().modules)
    assert calls["Runner.attend_alike"] == sites
    assert sum(calls.values()) <= most * sites, calls


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Calls are counted as on a GPU, where few are timed."""
    cell = Tally.cell
    monkeypatch.setattr(
        Tally, "cell", lambda self, site, kind, key, device, *a, **k: cell(self, site, kind, key, GPU, *a, **k)
    )
    monkeypatch.setattr("visattn.tally._event", time.perf_counter)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)


@pytest.fixture
def decided(monkeypatch):
    """Modules at which a call was looked up or looked at, rather than left to the model's own code."""
    seen = []
    for name in ("attend_alike", "attend"):
        plain = getattr(Runner, name)
        monkeypatch.setattr(
            Runner, name, lambda self, *a, plain=plain, **k: (seen.append(self.run.site), plain(self, *a, **k))[1]
        )
    return seen


@pytest.mark.parametrize("pattern", ["dense", PATTERN])
def test_modules_that_rest_run_the_models_own_code(pattern, as_on_a_gpu, dense_pays, decided):
    model, inputs = tiny_models.sdxl()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, pattern) as handle:
        for _ in range(3):
            assert torch.equal(tiny_models.run(model, inputs), stock)
        sites = len(handle.report().modules)
        decided.clear()
        assert torch.equal(tiny_models.run(model, inputs), stock)
        assert len(decided) <= sites // 8
        report = handle.report()
        assert (report.hits, report.dense) == (0, 4 * sites)
        # Timed calls, others' tokens, watchers and gradients are looked at.
        for _ in range(17):
            tiny_models.run(model, inputs)
        assert set(decided) == {site.site for site in report.modules}
        decided.clear()
        tiny_models.run(model, inputs | {"sample": inputs["sample"].repeat(1, 1, 2, 2)})
        assert len(set(decided)) == sites
        for shown in ([].append, None):
            handle.watch(shown)
            decided.clear()
            tiny_models.run(model, inputs)
        assert len(decided) <= sites // 8
    assert torch.equal(tiny_models.run(model, inputs), stock)


def test_modules_that_rest_are_looked_at_on_another_device(as_on_a_gpu, decided):
    model, inputs = tiny_models.sdxl()
    with visattn.apply(model, "dense") as handle:
        for _ in range(3):
            tiny_models.run(model, inputs)
        decided.clear()
        tiny_models.run(model.to("meta"), tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
        assert set(decided) == {site.site for site in handle.report().modules}


def test_modules_at_rest_see_that_diffusers_skips_scores(as_on_a_gpu):
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    model, inputs = tiny_models.sdxl()
    with visattn.apply(model, "dense") as handle:
        for _ in range(3):
            tiny_models.run(model, inputs)
        assert not handle.report().fallbacks
        with AttentionScoreSkipFunctionMode():
            tiny_models.run(model, inputs)
        report = handle.report()
    assert report.fallbacks == {"diffusers skips its scores for guidance": len(report.modules)}


def test_modules_that_run_a_pattern_never_rest(as_on_a_gpu, decided):
    model, inputs = tiny_models.sdxl()
    with visattn.apply(model, PATTERN) as handle:
        for _ in range(4):
            tiny_models.run(model, inputs)
        assert len(decided) >= 4 * len(handle.report().modules)
        assert handle.report().hits == 4 * len(handle.report().modules)


def test_hooks_before_blocks_come_with_the_first_gradients_and_go():
    model, inputs = tiny_models.flux()

    def hooked():
        return {name for name, module in model.named_modules() if module._forward_pre_hooks}

    before = hooked()
    with visattn.apply(model, PATTERN) as handle:
        sites = {site.site for site in handle.report().modules}
        with torch.no_grad():
            tiny_models.run(model, inputs)
        assert hooked() - before == {"", *sites}
        for _ in range(2):
            model(**inputs)
        assert {site.rpartition(".")[0] for site in sites} <= hooked()
        most = sum(len(module._forward_pre_hooks) for module in model.modules())
        model(**inputs)
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == most
    assert hooked() == before


@pytest.mark.crossing
def test_on_a_cpu_too_auto_keeps_dense_what_would_be_slower_and_says_so():
    model, inputs = tiny_models.sdxl()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, PATTERN) as handle:
        with pytest.warns(
            UserWarning, match=r"estimated [\d.]+ ms by \w+, [\d.]+ ms dense; apply\(\.\.\., always=True\)"
        ):
            assert torch.equal(tiny_models.run(model, inputs), stock)
        report = handle.report()
        sites = len(report.modules)
        assert (report.hits, report.dense, report.kept, report.fallbacks) == (0, sites, sites, {})
        assert re.search(r"! +1 call each kept dense: estimated [\d.]+ ms by \w+, [\d.]+ ms dense on", str(report))
        # What is being trained runs.
        sample = inputs["sample"].clone().requires_grad_()
        model(**{**inputs, "sample": sample}, return_dict=False)[0].sum().backward()
        assert handle.report().hits == sites and handle.report().kept == sites


@pytest.mark.crossing
@pytest.mark.parametrize("options", [{"always": True}, {"strict": True}, {"backend": "sdpa"}, {"precision": "int8"}])
def test_on_a_cpu_the_pattern_runs_where_it_must(options):
    model, inputs = tiny_models.sdxl()
    stock = tiny_models.run(model, inputs)
    with warnings.catch_warnings(), visattn.apply(model, PATTERN, **options) as handle:
        warnings.simplefilter("ignore")
        assert not torch.equal(tiny_models.run(model, inputs), stock)
        report = handle.report()
    assert report.hits == len(report.modules) and report.kept == 0
