"""Tuning a pipeline: twins, errors inside layers, schedules that run as they were predicted to, the whole search."""

import math

import diffusers
import pytest
import torch

import visattn
from tests.support import tiny_pipelines
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn.patterns.choice.memory import Memory, Place, placed
from visattn.pipelines.record import EVERYTHING
from visattn.pipelines.tuning import local
from visattn.pipelines.tuning.projection import projection
from visattn.pipelines.tuning.subject import PipelineSubject, Samples, schedule_of
from visattn.tuning.subject import DENSE

EDGES = (0.0, 0.5, 1.0)
CHEAP, GOOD = "topk(keep=0.05)", "topk(keep=0.5, rest=mean)"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Tiny models run dense attention faster than anything else."""
    monkeypatch.setattr(local, "HOPELESS", math.inf)


@pytest.fixture(scope="module")
def subject():
    samples = Samples(("red disc, flat", "blue bar, 3d"), steps=2, size=(64, 64), batch=2)
    return PipelineSubject(tiny_pixel_flux(), samples)


def test_it_knows_what_is_tuned(subject):
    assert (subject.model, subject.layers, subject.steps, subject.grid) == ("FluxTransformer2DModel", 2, 2, (16, 16))
    assert subject.about()["grid"] == [16, 16]


def test_dense_schedules_are_the_twins(subject):
    found = subject.outcome(EDGES, ((DENSE, DENSE),) * 2, (0, 1, 2))
    assert found.psnr == (math.inf,) * 3 and found.held(1.0) == math.inf and found.error == 0
    assert found.ssim == pytest.approx((1.0,) * 3) and 0 < found.attention_seconds < found.seconds


def test_a_sample_is_its_seed_whatever_its_batch(subject):
    together, alone = subject.twins((3, 4)), subject.twins((4,))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_errors_are_ordered_and_times_are_there(subject):
    names = (DENSE, CHEAP, GOOD, "na(window=3x3x3)")
    found = subject.local(1, names, (0, 1), names)
    assert len(found) == 2
    for layer in found:
        assert set(layer) == {DENSE, CHEAP, GOOD}
        assert layer[DENSE].error == 0 < layer[GOOD].error < layer[CHEAP].error
        assert all(each.seconds > 0 for each in layer.values())


def test_kept_lists_are_as_old_as_in_the_mean_and_times_are_only_those_asked_for(subject):
    kept = "topk(keep=0.5, rest=mean, every=2, drift=inf)"
    names = (DENSE, GOOD, kept)
    # Chosen in step 0 for step 1; step 0 itself has none that are older.
    late, first = subject.local(1, names, (0, 1), (GOOD,)), subject.local(0, names, (0, 1), (kept,))
    for layer in late:
        assert layer[kept].error != layer[GOOD].error
        assert layer[kept].seconds == layer[DENSE].seconds == 0 < layer[GOOD].seconds
    for layer in first:
        assert layer[kept].error == pytest.approx(layer[GOOD].error) and layer[kept].seconds > 0


@pytest.mark.parametrize("shared", ["residual(of=topk(keep=0.5), every=2, drift=inf)", "broadcast(every=2, drift=inf)"])
def test_what_steps_share_errs_by_its_age(subject, shared):
    """Of two steps one refreshes without any error: the mean over both is half of that of the other."""
    seen, names = [], (DENSE, shared)
    with torch.no_grad(), visattn.apply(subject.pipe, EVERYTHING) as handle:
        handle.watch(lambda watched: seen.append(watched))
        subject.pipe(**subject.arguments((0, 1)))
    layers = len(seen) // 2
    late, first = subject.local(1, names, (0, 1), names), subject.local(0, names, (0, 1), names)
    assert [set(layer) for layer in first] == [{DENSE}] * layers, "step 0 has nothing that is older"
    for before, now, layer in zip(seen[:layers], seen[layers:], late, strict=True):
        run, memory = visattn.attention, Memory()
        for step, watched in enumerate((before, now)):
            memory.begin(None, step, None)
            with placed(Place(memory, "call")):
                out = run(watched.q, watched.k, watched.v, shared, watched.layouts[0], scale=watched.scale)
        weight = projection(subject.pipe.transformer, now.site, out.shape[2] * out.shape[3])
        off, size = (local._projected(t, weight).square().sum() for t in (out - now.out, now.out))
        assert layer[shared].error == pytest.approx(float(off / size) / 2, rel=1e-3)
        assert layer[shared].seconds > 0


def test_a_schedule_that_shares_is_searched_and_verified(subject):
    from visattn.tuning.goal import Goal
    from visattn.tuning.journal import Journal
    from visattn.tuning.measure import Measurer
    from visattn.tuning.plan import Plan
    from visattn.tuning.search import Search

    names = (DENSE, "broadcast(every=2, drift=inf)", "residual(of=na(window=3x3), every=2, drift=inf)")
    plan = Plan(names, 1, groups=1, probes=1, checks=1, seeds=2, quick=2, steps=2)
    found = Search(Measurer(subject, plan, Journal(None, {})), Goal(psnr=10.0, held_out=2)).run()
    assert found.verified.psnr


def test_what_is_new_is_warmed_up_once(subject, monkeypatch):
    calls, real = [], type(subject.pipe).__call__

    def called(self, **arguments):
        calls.append(arguments.get("num_inference_steps"))
        return real(self, **arguments)

    monkeypatch.setattr(type(subject.pipe), "__call__", called)
    subject.outcome(EDGES, ((GOOD, DENSE),) * 2, (0, 1, 2), timed=False)
    rows = (("topk(keep=0.3)", DENSE),) * 2
    for timed, runs in ((False, 2), (True, 4), (True, 2)):
        calls.clear()
        subject.outcome(EDGES, rows, (0, 1, 2), timed)
        # In batches of two, and one that is left.
        assert len(calls) == runs


def test_errors_are_behind_the_output_projection(subject):
    model = subject.pipe.transformer
    double = projection(model, "transformer_blocks.0.attn", 64)
    assert double is model.transformer_blocks[0].attn.to_out[0].weight.detach() or torch.equal(
        double, model.transformer_blocks[0].attn.to_out[0].weight
    )
    single = projection(model, "single_transformer_blocks.0.attn", 64)
    assert torch.equal(single, model.single_transformer_blocks[0].proj_out.weight[:, :64])
    assert projection(model, "transformer_blocks.0.attn", 10_000) is None


def test_assignments_are_schedules(subject):
    schedule = schedule_of(EDGES, ((CHEAP, DENSE), (DENSE, DENSE)))
    with visattn.apply(subject.pipe, schedule, always=True) as handle:
        subject.pipe(**subject.arguments((0,)))
        report = handle.report()
    assert [site.hits for site in report.sites] == [1, 0]
    assert [site.dense for site in report.sites] == [1, 2]


def test_better_patterns_have_a_higher_psnr(subject):
    cheap, good = (subject.outcome(EDGES, ((name, DENSE),) * 2, (0, 1)) for name in (CHEAP, GOOD))
    assert cheap.error > good.error > 0
    # How far outputs are moved is all that an injection asks for.
    moved = subject.outcome(EDGES, ((GOOD, DENSE),) * 2, (0, 1), timed=False)
    assert moved.psnr == good.psnr and good.ssim and not moved.ssim


def test_two_transformers_with_guidance_in_two_forwards_share_a_schedule():
    pipe, _ = tiny_pipelines.wan(second=True)
    pipe.set_progress_bar_config(disable=True)
    samples = Samples(("a cat",), steps=4, guidance=3.0, size=(48, 48), frames=5, batch=1)
    subject = PipelineSubject(pipe, samples)
    names = (DENSE, "na(window=1x3x3)")
    found = [subject.local(step, names, (0,), ()) for step in (0, 3)]
    # The first transformer ran the first step, the second one the last.
    for layers in found:
        assert len(layers) == subject.layers == 2
        assert all(set(layer) == set(names) and layer[names[1]].error > 0 for layer in layers)
    assert found[0][0][names[1]].error != found[1][0][names[1]].error
    late, early = (subject.outcome(EDGES, (rows,) * 2, (0,), False) for rows in ((DENSE, names[1]), (names[1], DENSE)))
    assert all(0 < each.error < 1 and each.attention_seconds > 0 for each in (late, early)) and late != early


@pytest.mark.filterwarnings("error:no attention module")
def test_injections_do_not_run_again_what_is_dense_before_them():
    samples = Samples(("red disc, flat", "blue bar, 3d"), steps=4, size=(64, 64), batch=2)
    subject = PipelineSubject(tiny_pixel_flux(), samples)
    model, calls = subject.pipe.transformer, []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    seeds, late = (0, 1, 2), ((DENSE, CHEAP),) * 2
    subject.outcome(EDGES, ((CHEAP, CHEAP),) * 2, seeds)
    counts, outcomes = [], []
    for timed in (False, False, True):
        calls.clear()
        outcomes.append(subject.outcome(EDGES, late, seeds, timed))
        counts.append(len(calls))
    hook.remove()
    # In two batches of four steps: the first time beside a dense run, whose first half is played from then on;
    # what is timed is warmed up for two steps.
    assert counts == [8 + 4, 4, 8 + 4]
    assert outcomes[0].psnr == outcomes[1].psnr == outcomes[2].psnr and 0 < outcomes[0].error < 1
    assert "forward" not in vars(model)


@pytest.mark.skipif(not hasattr(diffusers, "FirstBlockCacheConfig"), reason="this diffusers has no such cache")
def test_with_a_cache_nothing_is_played_for_it_would_miss_what_was():
    pipe = tiny_pipelines.flux()[0]
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    subject = PipelineSubject(pipe, Samples(("a cat",), steps=4, size=(64, 64), batch=1))
    late = ((DENSE, CHEAP),) * 2
    assert subject.outcome(EDGES, late, (0,), timed=False).psnr == subject.outcome(EDGES, late, (0,)).psnr


def test_a_lora_is_part_of_what_is_tuned():
    peft = pytest.importorskip("peft")
    pipe, samples = tiny_pixel_flux(), Samples(("red disc, flat",), steps=2, size=(64, 64), batch=1)
    plain = PipelineSubject(pipe, samples).twins((0,))
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "proj_out"], init_lora_weights=False)
    )
    subject = PipelineSubject(pipe, samples)
    found = subject.local(1, (DENSE, CHEAP, GOOD), (0,), ())
    assert all(layer[DENSE].error == 0 < layer[GOOD].error < layer[CHEAP].error for layer in found)
    assert not torch.equal(subject.twins((0,)), plain)
    late = ((DENSE, CHEAP),) * 2
    assert subject.outcome(EDGES, late, (0,), timed=False).psnr == subject.outcome(EDGES, late, (0,)).psnr
