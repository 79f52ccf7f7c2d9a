"""apply() and its handle: what the report counts, schedules, step sources, and what is refused."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import diffusers
import diffusers.hooks.hooks
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import visattn
from tests.support import tiny_models
from visattn import Layout, dense_mask, parse
from visattn.kernels import sdpa
from visattn.schedule import Schedule, SiteName


class Pipe(diffusers.DiffusionPipeline):
    """The least that has a denoiser and a scheduler; calls the denoiser twice a step, as guidance does."""

    def __init__(self, transformer, scheduler, transformer_2=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2)

    @torch.no_grad()
    def __call__(self, inputs, steps=4):
        self.scheduler.set_timesteps(steps)
        x = inputs["hidden_states"]
        for i, t in enumerate(self.scheduler.timesteps):
            model = self.transformer if self.transformer_2 is None or i < 2 else self.transformer_2
            for _ in range(2):
                out = model(**{**inputs, "hidden_states": x}, return_dict=False)[0]
            x = self.scheduler.step(out[:, : x.shape[1]], t, x).prev_sample
        return x


def test_report_agrees_with_an_independent_count(monkeypatch):
    """Every call of torch's SDPA in self-attention is counted by hand, and densities are those of the masks."""
    model, inputs = tiny_models.sd15()
    calls = []
    real = sdpa.fused

    def counting(q, k, v, attn_mask=None, **options):
        calls.append((q.shape[2], attn_mask))
        return real(q, k, v, attn_mask, **options)

    monkeypatch.setattr(sdpa, "fused", counting)
    with visattn.apply(model, "na(window=3x5)", backend="sdpa") as handle:
        for _ in range(3):
            tiny_models.run(model, inputs)
        report = handle.report()
    assert len(calls) == report.hits == 3 * 4
    by_length = dict(calls)
    for site in report.modules:
        (call,) = site.calls
        layout = call.problem.layout
        assert sum(length == layout.length for length, _ in calls) == sum(
            s.hits for s in report.modules if s.calls[0].problem.layout == layout
        )
        assert call.density == pytest.approx(float(by_length[layout.length].float().mean()))
        assert call.density == pytest.approx(float(dense_mask("na(window=3x5)", layout).float().mean()))
        assert call.backend == "sdpa" and call.reason == "asked for"
    assert {s.calls[0].problem.layout.grid for s in report.modules} == {(12, 10), (6, 5)}
    assert 0 < report.sparse_seconds < 60 and report.dense_seconds == 0
    json.dumps(report.to_dict())
    assert report.to_dict()["sites"][0]["grid"] == [12, 10]
    assert "4 of 4 attention modules ran a pattern: 12 calls" in str(report)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in str(report)


def test_a_report_says_the_reason_once_and_nothing_of_engines_for_other_patterns():
    model, inputs = tiny_models.wan()
    with visattn.apply(model, "na(window=3)") as handle, torch.no_grad():
        model(**inputs)
        text = str(handle.report())
    assert text.count("cheapest:") == 1 and len(handle.report().modules) > 1
    assert "runs agent patterns only" not in text


def test_time_of_dense_and_sparse_calls_is_measured(monkeypatch):
    model, inputs = tiny_models.wan()
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("visattn.tally.time.perf_counter", lambda: next(clock))
    with visattn.apply(model, "na(window=3x3x3)", dense_steps=1) as handle:
        for step in range(3):
            handle.set_step(step, 3)
            tiny_models.run(model, inputs)
        report = handle.report()
    assert (report.dense_seconds, report.sparse_seconds) == (2 * 3, 4 * 3)
    assert [s.dense_seconds for s in report.modules] == [3, 3]


class TestFallbacks:
    def test_reason_is_counted(self):
        model, inputs = tiny_models.dit()
        with (
            visattn.apply(model, "na(window=3x3)", layout=Layout((5, 5))) as handle,
            pytest.warns(UserWarning, match="no attention module of DiTTransformer2DModel ran its pattern"),
        ):
            stock = tiny_models.run(model, inputs)
            tiny_models.run(model, inputs)
            report = handle.report()
        assert report.fallbacks == {"a sequence of 64 tokens is not grid 5x5": 6} and report.hits == 0
        assert "! 2 calls each fell back to dense: a sequence of 64" in " ".join(str(report).split())
        assert torch.equal(stock, tiny_models.run(model, inputs))

    def test_strict_raises(self):
        model, inputs = tiny_models.dit()
        with (
            visattn.apply(model, "na(window=3x3)", layout=Layout((5, 5)), strict=True),
            pytest.raises(ValueError, match=r"3 of 3 selected .* \(a sequence of 64 tokens is not grid 5x5\)"),
        ):
            tiny_models.run(model, inputs)

    def test_module_called_alone(self):
        model, _ = tiny_models.dit()
        with visattn.apply(model, "na(window=3x3)") as handle:
            model.transformer_blocks[0].attn1(tiny_models.noise(1, 64, 16))
            assert handle.report().fallbacks == {"called outside of the model's forward": 1}

    def test_module_called_alone_after_a_forward_that_raised(self):
        model, inputs = tiny_models.dit()
        module, tokens = model.transformer_blocks[0].attn1, tiny_models.noise(1, 64, 16)
        stock = module(tokens)
        with visattn.apply(model, "na(window=3x3)", strict=True):
            tiny_models.run(model, inputs)
            broken = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny_models.run(model, inputs)
            broken.remove()
            assert torch.equal(module(tokens), stock)

    def test_pattern_that_does_not_fit_the_grid_raises(self):
        model, inputs = tiny_models.dit()
        with visattn.apply(model, "na(window=5, dilation=3)"), pytest.raises(ValueError, match="larger than axis 0"):
            tiny_models.run(model, inputs)


class TestLayers:
    def patterns(self, **options):
        model, _ = tiny_models.flux()
        pattern = options.pop("pattern", "na(window=3x3)")
        with visattn.apply(model, pattern, **options) as handle:
            return {site.site: str(site.pattern) for site in handle.report().sites}

    def test_selectors(self):
        na = "na(window=3x3)"
        joint, one, two = (
            "transformer_blocks.0.attn",
            "single_transformer_blocks.0.attn",
            "single_transformer_blocks.1.attn",
        )
        assert self.patterns() == {joint: na, one: na, two: na}
        assert list(self.patterns()) == [joint, one, two]
        assert list(self.patterns(layers=-1)) == [two]
        assert list(self.patterns(layers=[0, 2])) == [joint, two]
        assert list(self.patterns(layers=slice(1, None))) == [one, two]
        assert list(self.patterns(layers="1-")) == [one, two]
        assert list(self.patterns(layers="0-1")) == [joint, one]
        assert list(self.patterns(layers="single_transformer_blocks.*")) == [one, two]
        assert list(self.patterns(layers="0, single_transformer_blocks.1")) == [joint, two]
        assert self.patterns(dense_layers=1) == {joint: "dense", one: na, two: na}
        assert self.patterns(dense_layers=1, layers="1-") == {one: "dense", two: na}
        mapping = {"0": "dense", "2": "na(window=5)"}
        assert self.patterns(pattern=mapping) == {joint: "dense", two: "na(window=5)"}

    @pytest.mark.parametrize("suffix", ["json", "yaml"])
    def test_file(self, tmp_path, suffix):
        if suffix == "yaml":
            pytest.importorskip("yaml")
        path = tmp_path / f"schedule.{suffix}"
        path.write_text(
            '{"0-1": "dense", "2-": "na(window=5)"}' if suffix == "json" else '"0-1": dense\n2-: na(window=5)'
        )
        for given in (path, str(path)):
            assert list(self.patterns(pattern=given).values()) == ["dense", "dense", "na(window=5)"]

    def test_unselected_modules_are_untouched(self):
        model, inputs = tiny_models.flux()
        before = model.transformer_blocks[0].attn.processor._attention_backend
        with visattn.apply(model, "na(window=3x3)", layers="1-", strict=True) as handle:
            assert model.transformer_blocks[0].attn.processor._attention_backend is before
            tiny_models.run(model, inputs)
            assert handle.report().hits == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": 7}, "7 selects nothing in FluxTransformer2DModel; its 3 layers: 0 transformer_blocks.0, 1 "),
            ({"layers": "blocks.*.nope"}, "'blocks.*.nope' selects nothing"),
            ({"layers": [1.5]}, "1.5 is not an index, a slice, a range"),
            ({"dense_layers": 3}, "dense_layers=3 leaves nothing of the 3 selected layers"),
            ({"dense_layers": -1}, "dense_layers=-1 must be a count"),
            ({"dense_steps": 1.0}, "dense_steps=1.0 must be a count of steps like 12 or a fraction"),
            ({"dense_steps": True}, "dense_steps=True must be"),
            ({"pattern": {}}, "names no layer"),
            ({"pattern": {"0": "dense"}, "layers": 1}, "both choose layers"),
            ({"pattern": {"0-1": "dense", "1": "na(window=3)"}}, "'single_transformer_blocks.0' is given twice"),
            ({"pattern": "missing.json"}, "'missing.json' does not exist"),
            ({"backend": "nope"}, "unknown backend 'nope'"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError) as error:
            self.patterns(**options)
        assert message in str(error.value)

    def test_file_without_layers_is_refused(self, tmp_path):
        (tmp_path / "list.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"list.json must map layers to patterns"):
            Schedule.of(tmp_path / "list.json")


class TestSteps:
    def sparse_calls(self, dense_steps, steps=4, scheduler=None, **parts):
        model, inputs = tiny_models.wan()
        pipe = Pipe(model, scheduler or FlowMatchEulerDiscreteScheduler(), **parts)
        kind = type(pipe.scheduler)
        with visattn.apply(pipe, "na(window=3x3x3)", dense_steps=dense_steps) as handle:
            pipe(inputs, steps)
            pipe(inputs, steps)
            report = handle.report()
            assert pipe.scheduler.__class__.__name__ == kind.__name__
        assert type(pipe.scheduler) is kind and "_visattn_count" not in vars(pipe.scheduler)
        return report.hits, report.dense

    def test_scheduler_counts(self):
        # Two runs of 4 steps, 2 forwards a step, 2 modules.
        assert self.sparse_calls(0) == (32, 0)
        assert self.sparse_calls(3) == (8, 24)
        assert self.sparse_calls(9) == (0, 32)
        assert self.sparse_calls(0.25) == (24, 8)
        assert self.sparse_calls(1, scheduler=DDIMScheduler()) == (24, 8)

    def test_two_transformers_share_the_steps(self):
        second, _ = tiny_models.wan()
        assert self.sparse_calls(3, transformer_2=second) == (8, 24)

    def test_cache_context_tells_the_step(self):
        model, inputs = tiny_models.wan()
        if not hasattr(diffusers.hooks.hooks, "CacheContext"):
            pytest.skip("the contexts of this diffusers do not tell the step")
        had = hasattr(model, "_diffusers_hook")
        with visattn.apply(model, "na(window=3x3x3)", dense_steps=0.5) as handle:
            for i in range(4):
                with model.cache_context("cond", step_index=i, num_inference_steps=4):
                    tiny_models.run(model, inputs)
            assert (handle.report().hits, handle.report().dense) == (4, 4)
        assert hasattr(model, "_diffusers_hook") == had

    def test_said_step_wins(self):
        model, inputs = tiny_models.wan()
        pipe = Pipe(model, FlowMatchEulerDiscreteScheduler())
        with visattn.apply(pipe, "na(window=3x3x3)", dense_steps=2) as handle:
            handle.set_step(3)
            pipe(inputs)
            assert handle.report().dense == 0
            handle.set_step(None)
            pipe(inputs)
            assert handle.report().dense == 8

    def test_unknown_step_raises(self):
        model, inputs = tiny_models.dit()
        with visattn.apply(model, "na(window=3x3)", dense_steps=2) as handle:
            with pytest.raises(ValueError, match=r"dense_steps=2 needs the step, .* call handle.set_step\(i, n\)"):
                tiny_models.run(model, inputs)
            handle.set_step(0)
            tiny_models.run(model, inputs)
            with pytest.raises(ValueError, match="step=4 must be at least 0 and below the number of steps, total=4"):
                handle.set_step(4, 4)
        with visattn.apply(model, "na(window=3x3)", dense_steps=0.5) as handle:
            handle.set_step(0)
            with pytest.raises(ValueError, match=r"dense_steps=0.5 needs the number of steps"):
                tiny_models.run(model, inputs)

    def test_replaced_and_copied_schedulers(self):
        model, inputs = tiny_models.wan()
        first = FlowMatchEulerDiscreteScheduler()
        pipe = Pipe(model, first)
        with visattn.apply(pipe, "na(window=3x3x3)", dense_steps=2) as handle:
            twin, frozen = copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))
            assert type(twin) is type(frozen) is FlowMatchEulerDiscreteScheduler
            pipe.scheduler.set_timesteps(4)
            twin.set_timesteps(4)
            twin.step(torch.zeros(2), twin.timesteps[0], torch.zeros(2))
            tiny_models.run(model, inputs)
            pipe.scheduler = DDIMScheduler()
            with pytest.raises(ValueError, match="needs the step"):
                tiny_models.run(model, inputs)
            pipe(inputs)
            assert handle.report().dense == 2 + 8
        assert type(first) is FlowMatchEulerDiscreteScheduler and type(pipe.scheduler) is DDIMScheduler

    def test_rounding(self):
        site = SiteName("a.attn", "a")
        assert Schedule.of("dense").assign([site], "M") == [parse("dense")]
        thirds = Schedule.of("na(window=3)", dense_steps=0.1)
        assert [thirds.is_dense(i, 30) for i in range(4)] == [True, True, True, False]


class TestRefusals:
    def test_applying_twice(self):
        model, inputs = tiny_models.dit()
        stock = tiny_models.run(model, inputs)
        with visattn.apply(model, "na(window=3x3)"), pytest.raises(ValueError, match="is patched already: call remove"):
            visattn.apply(model, "dense")
        assert torch.equal(tiny_models.run(model, inputs), stock)
        second, _ = tiny_models.wan()
        pipe = Pipe(tiny_models.wan()[0], FlowMatchEulerDiscreteScheduler(), second)
        with visattn.apply(second, "dense"), pytest.raises(ValueError, match="transformer_2 is patched already"):
            visattn.apply(pipe, "na(window=3)", dense_steps=1)
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
        with visattn.apply(pipe, "na(window=3)"):
            pass

    def test_unknown_model_needs_a_layout(self):
        unknown = tiny_models.prior_transformer()
        with pytest.raises(ValueError) as error:
            visattn.apply(unknown[0], "na(window=3)")
        assert "PriorTransformer is a model class that visattn does not know: pass layout=Layout" in str(error.value)
        assert "WanTransformer3DModel" in str(error.value)
        stock = tiny_models.run(*unknown)
        with visattn.apply(unknown[0], "na(window=3)", layout=Layout((6,), prefix=2, suffix=3), strict=True) as handle:
            sparse = tiny_models.run(*unknown)
            assert handle.report().sites_hit == 2
        assert not torch.allclose(sparse, stock)

    def test_each_length_of_a_sequence_has_its_layout(self):
        """The levels of a UNet, given by hand: the same as what its record finds."""
        model, inputs = tiny_models.sd15()
        with visattn.apply(model, "na(window=3x3)", strict=True):
            expected = tiny_models.run(model, inputs)
        levels = Layout((12, 10)), Layout((6, 5))
        with visattn.apply(model, "na(window=3x3)", layout=levels, strict=True) as handle:
            assert torch.equal(tiny_models.run(model, inputs), expected)
            assert handle.report().sites_hit == 4
        with visattn.apply(model, "na(window=3x3)", layout=levels[1:], dense_layers=0) as handle:
            tiny_models.run(model, inputs)
        assert list(handle.report().fallbacks) == ["a sequence of 120 tokens is not grid 6x5"]

    @pytest.mark.parametrize(
        ("layouts", "why"),
        [
            ((), "layout is empty: pass Layout"),
            ((Layout(4), Layout((2, 3))), "4 and 2x3: pass layouts with equally many axes, one for each length"),
            (
                (Layout((2, 2)), Layout((1, 3), 1)),
                "2x2 and 1x3, prefix 1: pass layouts with equally many axes, one for",
            ),
            (Layout((2, 2), 0, 0, Layout((1, 1))), "has a key_layout: pass where the tokens of its self-attention sit"),
            ([(2, 2)], "layout=.* is a tuple: pass a Layout"),
        ],
    )
    def test_layouts_that_cannot_be_meant_are_named(self, layouts, why):
        with pytest.raises(ValueError, match=why):
            visattn.apply(tiny_models.sd15()[0], "na(window=3x3)", layout=layouts)

    def test_things_that_are_no_model(self):
        with pytest.raises(ValueError, match=r"cannot apply to a torch.nn.modules.linear.Linear: pass a diffusers"):
            visattn.apply(torch.nn.Linear(1, 1), "dense")
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        with pytest.raises(ValueError, match="AutoencoderKL is a model class that visattn does not know"):
            visattn.apply(vae, "dense")

    def test_processor_without_sdpa(self):
        from diffusers.models.attention_processor import AttnProcessor

        model, inputs = tiny_models.sd15()
        model.set_attn_processor(AttnProcessor())
        before = tiny_models.run(model, inputs)
        with pytest.raises(ValueError, match="AttnProcessor computes attention itself"):
            visattn.apply(model, "na(window=3x3)")
        assert torch.equal(tiny_models.run(model, inputs), before)


def test_threads_with_a_model_each_and_one_for_all():
    """Four threads, four grids: results are those of running alone."""
    grids = [(12, 8), (8, 12), (16, 6), (6, 16)]
    shared, _ = tiny_models.wan()
    own = [tiny_models.wan()[0] for _ in grids]
    handles = [visattn.apply(m, "na(window=3x3x3)", strict=True) for m in (shared, *own)]
    inputs = [tiny_models.wan_inputs(3, *grid) for grid in grids]
    expected = [tiny_models.run(shared, x) for x in inputs]
    failures = []

    def work(i):
        for model in (shared, own[i]) * 3:
            got = tiny_models.run(model, inputs[i])
            if not torch.allclose(got, expected[i], rtol=1e-4, atol=1e-5):
                failures.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not failures
    assert handles[0].report().hits == 2 * (4 + 4 * 3) and handles[1].report().hits == 2 * 3
    for handle in handles:
        handle.remove()
