"""Attention that denoising steps share: runs of pipelines against the same by hand, and who never shares."""

import threading

import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.pipelines.test_kept_choices import SITES, Pipe
from tests.support import tiny_models, tiny_pipelines
from tests.support.by_hand import ByHand
from visattn import Layout, parse
from visattn.kernels import sharing
from visattn.pipelines.patch.install import patched_model

GRIDS = {"flux": [Layout((6, 8), 8)], "stable_diffusion": [Layout((12, 8)), Layout((6, 4))], "wan": [Layout((3, 3, 4))]}


def text_of(kind, of, every, drift="inf"):
    return f"{kind}(every={every}, drift={drift}{'' if of is None else f', of={of}'})"


@pytest.fixture
def refreshed(monkeypatch):
    """Every call that computes anew."""
    found, real = [], sharing._refresh

    def refreshing(q, k, v, call, pattern, slot):
        found.append((q.shape, None if slot is None else slot.memory.step))
        return real(q, k, v, call, pattern, slot)

    monkeypatch.setattr(sharing, "_refresh", refreshing)
    return found


@pytest.mark.parametrize("name", ["flux", "stable_diffusion", "wan"])
@pytest.mark.parametrize(("kind", "window"), [("residual", 3), ("broadcast", 3), ("broadcast", None)])
def test_a_run_is_what_it_is_by_hand(name, kind, window):
    """FLUX with text in one forward; a UNet with both halves in one batch; two transformers, halves one by one."""
    pipe, options = getattr(tiny_pipelines, name)(**({"second": True} if name == "wan" else {}))
    pipe.to(torch.float64)
    layouts = GRIDS[name]
    of = None if window is None else f"na(window={'x'.join([str(window)] * layouts[0].dims)})"
    models = [m for m in (getattr(pipe, n, None) for n in ("transformer", "transformer_2", "unet")) if m is not None]
    options = {"output_type": "latent", **options}
    by_hand = ByHand(kind, 2, layouts, of, halves=2 if name == "wan" else 1)
    with by_hand.attending(*models):
        truth = tiny_pipelines.generate(pipe, options, steps=5)
    dense = tiny_pipelines.generate(pipe, options, steps=5)
    with visattn.apply(pipe, text_of(kind, of, 2), strict=True) as handle:
        for _ in range(2):
            # The second run begins anew.
            found = tiny_pipelines.generate(pipe, options, steps=5)
            assert (found - truth).abs().max() < 1e-9 * truth.abs().max()
        report = handle.report()
    assert (truth - dense).abs().max() > 1e-6
    calls = [call for site in report.modules for call in site.calls]
    assert sum(call.shared.refreshed for call in calls) == 2 * len(by_hand.refreshed)
    assert report.hits == 2 * (len(by_hand.refreshed) + len(by_hand.shared))


@settings(deadline=None, max_examples=12)
@given(
    kind=st.sampled_from(["residual", "broadcast"]),
    every=st.integers(2, 5),
    steps=st.integers(1, 7),
    halves=st.integers(1, 2),
    batch=st.integers(1, 2),
)
def test_any_number_of_steps(kind, every, steps, halves, batch):
    model, inputs = tiny_models.wan()
    model, inputs = (
        model.double(),
        {n: x.double()[:batch] if x.is_floating_point() else x[:batch] for n, x in inputs.items()},
    )
    pipe, of = Pipe(model), "na(window=3x3x3)"
    by_hand = ByHand(kind, every, [Layout((3, 6, 4))], of, halves)
    with by_hand.attending(model):
        truth = pipe(inputs, steps, halves=halves)
    with visattn.apply(pipe, text_of(kind, of, every), strict=True) as handle:
        found = pipe(inputs, steps, halves=halves)
        calls = [call for site in handle.report().modules for call in site.calls]
    assert (found - truth).abs().max() < 1e-9 * truth.abs().max()
    assert sum(call.shared.refreshed for call in calls) == len(by_hand.refreshed) == SITES * halves * -(-steps // every)
    assert {call.shared.nbytes > 0 for call in calls} == {steps > 1}


def test_no_run_takes_from_another(refreshed):
    """The next run, one after a run that was broken off, one of another thread, and runs that take turns."""
    model, inputs = tiny_models.wan()
    pipe, other = Pipe(model), Pipe(model)
    each = 2 * SITES
    with visattn.apply(pipe, text_of("broadcast", None, 9), strict=True):
        alone = pipe(inputs)
        for stop in (0, 1, 3):
            with pytest.raises(KeyboardInterrupt):
                pipe(inputs, stop=stop)
            refreshed.clear()
            assert torch.equal(pipe(inputs), alone) and len(refreshed) == each
        refreshed.clear()
        runs = [threading.Thread(target=p, args=(inputs,)) for p in (pipe, other)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert len(refreshed) == 2 * each
        refreshed.clear()
        for each_pipe in (pipe, other):
            each_pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            for each_pipe in (pipe, other):
                each_pipe.forward(inputs)
        assert len(refreshed) == 4 * SITES


def test_another_grid_or_batch_computes_anew(refreshed):
    model, inputs = tiny_models.wan()
    with visattn.apply(model, text_of("broadcast", None, 9), strict=True) as handle:
        for step in range(3):
            for sample in (inputs["hidden_states"], inputs["hidden_states"][:, :, :, :8]):
                handle.set_step(step, 4)
                tiny_models.run(model, inputs, hidden_states=sample)
        assert len(refreshed) == 2 * SITES
        handle.set_step(0, 4)
        tiny_models.run(model, inputs)
        assert len(refreshed) == 3 * SITES, "a step that goes back begins another run"


@pytest.mark.parametrize("every", [3, 4])
def test_forwards_are_told_apart_by_name_where_a_step_leaves_some_out(refreshed, every):
    """A guider turns one of its predictions off and another on: the second forward of a step is not always the same."""
    model, inputs = tiny_models.wan()
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    named = [("cond", "uncond"), ("cond", "uncond"), ("cond",), ("skip", "cond"), ("skip", "uncond")]
    found = []
    with visattn.apply(model, text_of("broadcast", None, every), strict=True) as handle:
        for step, names in enumerate(named):
            handle.set_step(step, 9)
            for name in names:
                with model.cache_context(name):
                    before = len(refreshed)
                    tiny_models.run(model, other if name == "uncond" else inputs)
                found += [(step, name)] * (len(refreshed) > before)
    assert found == [(0, "cond"), (0, "uncond"), (3, "skip"), *[(3, "cond")] * (every == 3), (4, "uncond")]


def test_steps_that_were_skipped_count(refreshed):
    model, inputs = tiny_models.wan()
    with visattn.apply(model, text_of("broadcast", None, 3), strict=True) as handle:
        for step, times in ((0, 1), (2, 1), (3, 2), (9, 3), (11, 3), (12, 4)):
            handle.set_step(step, 20)
            tiny_models.run(model, inputs)
            assert len(refreshed) == times * SITES


def test_a_layer_that_changes_patterns_takes_what_is_fresh_enough(refreshed):
    model, inputs = tiny_models.wan()
    own = text_of("broadcast", None, 3)
    with visattn.apply(model, {"0-": {"0-1": own, "2": "dense", "3-": own}}, dense_last_steps=1) as handle:
        for step in range(8):
            handle.set_step(step, 8)
            tiny_models.run(model, inputs)
        memory = patched_model(model).run.here.memory
    assert [step for _, step in refreshed[::SITES]] == [0, 3, 6]
    assert not len(memory)


def test_calls_with_gradients_are_dense_and_the_report_says_so():
    model, inputs = tiny_models.wan()
    losses = []
    for text in (None, "residual(of=na(window=3x3x3), drift=inf)"):
        model.zero_grad()
        handle = None if text is None else visattn.apply(model, text, strict=True)
        for step in range(2):
            if handle is not None:
                handle.set_step(step, 2)
            out = model(**inputs, return_dict=False)[0]
        out.square().mean().backward()
        losses.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if handle is not None:
            report = handle.report()
            handle.remove()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*losses, strict=True))
    assert all(call.shared == (2, 0) for site in report.modules for call in site.calls)
    assert report.density == pytest.approx(1)
    assert "2 of 2 computed anew, nothing kept" in str(report)
    assert "no call kept anything for later steps" in " ".join(str(report).split())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_dense(reentrant):
    model, inputs = tiny_models.wan()
    inputs = {**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()}
    grads = []
    for text in (None, "broadcast(drift=inf)"):
        model.enable_gradient_checkpointing(
            lambda f, *given: torch.utils.checkpoint.checkpoint(f, *given, use_reentrant=reentrant)
        )
        model.train()
        handle = None if text is None else visattn.apply(model, text, strict=True)
        for step in range(2):
            if handle is not None:
                handle.set_step(step, 4)
            model.zero_grad()
            model(**inputs, return_dict=False)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if handle is not None:
            handle.remove()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_compiled_code_shares(refreshed):
    model, inputs = tiny_models.flux(single=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outs = []
    with visattn.apply(model, "residual(of=na(window=3x3), every=2, drift=inf)", strict=True) as handle:
        for net in (model, compiled):
            refreshed.clear()
            handle.set_step(None)
            for step, times in ((0, 1), (1, 1), (2, 2), (3, 2)):
                handle.set_step(step, 5)
                given = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.1 * step)}
                outs.append(tiny_models.run(net, given))
                assert len(refreshed) == times * SITES
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outs[:4], outs[4:], strict=True))
    torch._dynamo.reset()


class Sometimes(torch.nn.Module):
    """A block that is left out where `out` says so."""

    def __init__(self, block, out):
        super().__init__()
        self.block, self.out = block, out

    def forward(self, tokens, *args, **kwargs):
        return tokens if self.out else self.block(tokens, *args, **kwargs)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_code_tells_its_modules_where_some_are_left_out(whole):
    """One graph for all blocks, and none takes what another kept."""
    model, inputs = tiny_models.wan()
    assert len(model.blocks) > 1
    outs = []
    with visattn.apply(model, "residual(of=na(window=3x3x3), every=2, drift=inf)") as handle:
        blocks, out = list(model.blocks), []
        model.blocks[0] = Sometimes(blocks[0], out)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for compiled in (False, True):
            if compiled and not whole:
                for block in blocks:
                    block.compile(backend="eager", fullgraph=True)
            net = torch.compile(model, backend="eager") if compiled and whole else model
            handle.set_step(None)
            for step in range(4):
                out[:] = [1] * (step % 2)
                handle.set_step(step, 5)
                given = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.1 * step)}
                with torch.no_grad():
                    outs.append(tiny_models.run(net, given))
        assert whole or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not any(hasattr(module, "_visattn_number") for module in model.modules())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outs[:4], outs[4:], strict=True))
    torch._dynamo.reset()


def test_a_cache_that_skips_blocks(refreshed):
    """Blocks that a cache of diffusers leaves out keep nothing, and take nothing that is too old."""
    import diffusers

    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("this diffusers has no FirstBlockCacheConfig")
    pipe, options = tiny_pipelines.flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    with visattn.apply(pipe, text_of("broadcast", None, 2)) as handle:
        tiny_pipelines.generate(pipe, options, steps=5)
        rows = {site.site: [call.shared.refreshed for call in site.calls] for site in handle.report().modules}
    pipe.transformer.disable_cache()
    first, *others = rows.values()
    assert first == [3] and all(sum(each) <= 1 for each in others)


def test_who_tells_no_step_is_refused():
    model, inputs = tiny_models.wan()
    with (
        visattn.apply(model, "broadcast"),
        pytest.raises(ValueError, match=r"broadcast.* needs the step, and nothing tells it: apply to the pipeline"),
    ):
        tiny_models.run(model, inputs)
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with pytest.raises(ValueError, match=r"keeps something for later denoising steps, .* none: give dense"):
        visattn.apply(vit, "broadcast")


def test_a_report_counts_what_computes_anew_and_what_is_kept():
    model, inputs = tiny_models.wan()
    with visattn.apply(pipe := Pipe(model), text_of("residual", "na(window=3x3x3)", 3), strict=True) as handle:
        pipe(inputs)
        report = handle.report()
    layout = Layout((3, 6, 4))
    share = visattn.plan("na(window=3x3x3)", layout).density
    assert report.density == pytest.approx(0.75 * share + 0.5), "steps 0 and 3, the last one without the window"
    call = report.modules[0].calls[0]
    batch = inputs["hidden_states"].shape[0]
    assert call.shared.refreshed == 2 * 2 and call.shared.nbytes == batch * 72 * 2 * 12 * 4
    assert f"4 of 8 computed anew, {call.shared.nbytes / 1000:.3g} KB kept for later steps" in " ".join(
        str(report).split()
    )
    assert report.to_dict()["sites"][0]["calls"][0]["shared"] == {"refreshed": 4, "nbytes": call.shared.nbytes}
    assert parse(call.problem.pattern) is call.problem.pattern
