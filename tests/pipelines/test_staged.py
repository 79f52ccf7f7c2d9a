"""Patterns by step inside pipelines: what runs when, with whatever else drives or changes the model."""

import diffusers
import pytest
import torch

import visattn
from tests.pipelines.test_handle import Pipe
from tests.support import tiny_models, tiny_pipelines
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn.schedule import Schedule
from visattn.tuned import Tuned

STEPS, SITES = 4, 4
OPTIONS = {"height": 24, "width": 16, "generator": None, "num_inference_steps": STEPS, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe():
    parts = {**tiny_pipelines.stable_diffusion()[0].components, "scheduler": diffusers.DDIMScheduler()}
    made = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, pattern=None, **more):
    options = OPTIONS | {"generator": torch.Generator().manual_seed(0)}
    if pattern is None:
        return torch.from_numpy(pipe("a cat", **options)[0]), None
    with visattn.apply(pipe, pattern, strict=True, **more) as handle:
        return torch.from_numpy(pipe("a cat", **options)[0]), handle.report()


def test_a_schedule_of_dense_steps_is_dense_steps(pipe):
    staged, report = draw(pipe, {"0-": {"0-0.5": "dense", "0.5-": "na(window=3x3)"}})
    plain, _ = draw(pipe, "na(window=3x3)", dense_steps=2)
    dense, _ = draw(pipe)
    assert torch.equal(staged, plain) and not torch.equal(staged, dense)
    assert (report.hits, report.dense) == (2 * SITES, 2 * SITES)
    assert torch.equal(draw(pipe)[0], dense)


def test_reports_tell_steps_and_layers_apart(pipe):
    layers = {"0": {"0-1": "na(window=3x3)", "2-": "clear(radius=2)"}, "1": {"1": "na(window=3x3)"}}
    _, report = draw(pipe, layers)
    first, second = report.sites
    assert [(steps, calls[0].hits) for steps, calls in first.stages] == [("0-1", 2), ("2-", 2)]
    assert [(steps, calls[0].hits) for steps, calls in second.stages] == [("1", 1)]
    assert second.dense == 3 and report.hits == 5 and not report.fallbacks
    assert "steps 2-: clear(radius=2), 2 hits" in str(report)
    assert [each["steps"] for each in report.to_dict()["sites"][0]["stages"]] == ["0-1", "2-"]


def test_all_steps_one_pattern_is_that_pattern(pipe):
    staged, _ = draw(pipe, {"0-": {"0-0.5": "na(window=3x3)", "0.5-": "na(window=3x3)"}})
    assert torch.equal(staged, draw(pipe, "na(window=3x3)")[0])


def test_a_stage_in_8_bits_is_8_bits_in_its_steps():
    pipe = tiny_pixel_flux()
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "np"}

    def one(pattern, **more):
        with visattn.apply(pipe, pattern, always=True, **more) as handle:
            drawn = pipe("red disc, flat", generator=torch.Generator().manual_seed(0), **options).images
            return torch.as_tensor(drawn), handle.report()

    staged, report = one({"0-": {"0-0.5": "topk(keep=0.5)", "0.5-": "topk(keep=0.5) in int8"}})
    assert torch.equal(staged, one("topk(keep=0.5)", precision="int8", precise_steps=2)[0])
    assert not torch.equal(staged, one("topk(keep=0.5)")[0])
    assert {call.problem.precision for site in report.sites for call in site.calls} == {None, "int8"}
    with pytest.warns(UserWarning, match="has parts in int8, which a CPU simulates for its errors") as told:
        scheduled = one("topk(keep=0.5) in int8")[0]
    assert sum("simulates" in str(each.message) for each in told) == 1
    # Who asks for it has been told by the page.
    assert torch.equal(scheduled, one("topk(keep=0.5)", precision="int8")[0])


def test_choices_that_are_kept_follow_the_stage(pipe):
    staged, report = draw(pipe, {"0-": {"0-1": "topk(keep=0.5, every=2)", "2-": "topk(keep=0.2, every=2)"}})
    assert torch.isfinite(staged).all() and report.hits == STEPS * SITES


def test_a_file_is_scaled_to_the_grid(pipe, tmp_path):
    # 12x8 tokens at 24x16 pixels; tuned on half of that.
    layers = {str(i): {"0-0.5": "dense", "0.5-1": "na(window=3x3)"} for i in range(SITES)}
    path = tmp_path / "tuned.json"
    Tuned("UNet2DConditionModel", SITES, (6, 4), layers).write(path)
    staged, report = draw(pipe, str(path))
    expected, _ = draw(pipe, {"0-": {"0-0.5": "dense", "0.5-1": "na(window=7x7)"}})
    assert torch.equal(staged, expected)
    assert {str(call.problem.pattern) for site in report.sites for call in site.calls} == {"na(window=7x7)"}


def test_other_models_are_refused_and_left_alone(pipe):
    before = [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")]
    with pytest.raises(ValueError, match="tuned for FluxTransformer2DModel"):
        visattn.apply(pipe, Schedule.tuned(Tuned("FluxTransformer2DModel", SITES, (6, 4), {"0": {"0-1": "dense"}})))
    assert [module.processor for module in pipe.unet.modules() if hasattr(module, "processor")] == before


def test_a_bare_model_is_told_the_step(pipe):
    with visattn.apply(pipe.unet, {"0-": {"0-0.5": "dense", "0.5-": "na(window=3x3)"}}) as handle:
        latents, text = torch.zeros(1, 4, 12, 8), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
        with torch.no_grad():
            for step in range(4):
                handle.set_step(step, 4)
                pipe.unet(latents, 1, text)
        assert handle.report().hits == 2 * SITES


STAGED = {"0-": {"0-0.5": "dense", "0.5-": "na(window=3x3x3)"}}


def test_two_transformers_share_the_steps_of_a_run():
    model, inputs = tiny_models.wan()
    pipe = Pipe(model, diffusers.FlowMatchEulerDiscreteScheduler(), tiny_models.wan()[0])
    with visattn.apply(pipe, STAGED, strict=True) as handle:
        # Two forwards a step, as guidance makes them: the second model runs the second half.
        pipe(inputs, 4)
        hits = {site.model: site.hits for site in handle.report().sites[::2]}
    assert hits == {"transformer": 0, "transformer_2": 4}


@pytest.mark.skipif(not hasattr(diffusers, "FirstBlockCacheConfig"), reason="this diffusers has no such cache")
def test_modules_that_a_cache_skips_are_not_missed():
    model, inputs = tiny_models.flux()
    with visattn.apply(model, {"0": {"0-1": "na(window=3x3)"}, "1-": {"2-": "na(window=3x3)"}}) as handle:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
        for step in range(4):
            handle.set_step(step, 4)
            with model.cache_context("cond"):
                tiny_models.run(model, inputs)
        # The first block runs in every step, the others in the first one alone.
        assert [(site.hits, site.dense) for site in handle.report().sites] == [(2, 2), (0, 1), (0, 1)]
        model.disable_cache()


def test_a_lora_changes_what_attention_gets_and_not_what_it_lists():
    from peft import LoraConfig

    outputs = {}
    for name, pattern in {"staged": STAGED, "plain": "na(window=3x3x3)"}.items():
        model, inputs = tiny_models.wan()
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        with visattn.apply(model, pattern, strict=True, **({} if name == "staged" else {"dense_steps": 2})) as handle:
            found = []
            for step in range(4):
                handle.set_step(step, 4)
                found.append(tiny_models.run(model, inputs))
        outputs[name] = torch.stack(found)
    assert torch.equal(outputs["staged"], outputs["plain"])


def test_compiled_code_follows_the_stage():
    model, inputs = tiny_models.flux()
    with visattn.apply(model, {"0-": {"0-1": "dense", "2-": "na(window=3x3)"}}, strict=True) as handle:
        eager, compiled = [], []
        for step in range(4):
            handle.set_step(step, 4)
            eager.append(tiny_models.run(model, inputs))
        fast = torch.compile(model, backend="eager", fullgraph=True)
        for step in range(4):
            handle.set_step(step, 4)
            compiled.append(tiny_models.run(fast, inputs))
        torch.testing.assert_close(torch.stack(compiled), torch.stack(eager))
        report = handle.report()
    (row,) = [site for site in report.sites if site.compiled]
    assert (row.hits, row.dense) == (6, 6)
