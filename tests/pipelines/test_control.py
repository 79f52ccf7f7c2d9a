"""ControlNets are patched with their pipeline and alone; attention over frames is never taken for attention in one."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import visattn
from tests.support import tiny_control, tiny_models, tiny_pipelines, tiny_unets


def controlled(control):
    pipe, _ = tiny_pipelines.stable_diffusion()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, images=1):
    image = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "num_inference_steps": 2}
    return pipe("a cat", image=image if images == 1 else [image] * images, height=24, width=16, **options).images


def test_a_controlnet_is_patched_with_its_pipeline():
    control, _ = tiny_control.controlnet()
    pipe = controlled(control)
    stock = generate(pipe)
    with visattn.apply(pipe, "na(window=3x3)", dense_steps=1, strict=True) as handle:
        assert not torch.equal(generate(pipe), stock)
        report = handle.report()
    assert {site.model for site in report.sites} == {"unet", "controlnet"}
    # One of two steps is dense, there as here.
    assert {(site.hits, site.dense) for site in report.sites} == {(1, 1)}
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("listed", [True, False])
def test_several_controlnets_are_patched_each(listed):
    nets = [tiny_control.controlnet()[0] for _ in range(2)]
    pipe = controlled(nets if listed else diffusers.models.controlnets.multicontrolnet.MultiControlNetModel(nets))
    stock = generate(pipe, 2)
    with visattn.apply(pipe, "na(window=3x3)", strict=True) as handle:
        assert not torch.equal(generate(pipe, 2), stock)
    assert {site.model for site in handle.report().sites} == {"unet", "controlnet.nets.0", "controlnet.nets.1"}
    with visattn.apply(pipe.controlnet, "na(window=3x3)", strict=True) as handle:
        generate(pipe, 2)
    assert {site.model for site in handle.report().sites} == {"nets.0", "nets.1"}
    assert torch.equal(generate(pipe, 2), stock)


def test_several_controlnets_follow_the_pipeline_that_runs_them():
    """Another scheduler, and another pipeline with one of its own: which step it is says whoever calls."""
    pipe = controlled([tiny_control.controlnet()[0] for _ in range(2)])
    with visattn.apply(pipe, "na(window=3x3)", dense_steps=1) as handle:
        pipe.scheduler = diffusers.EulerDiscreteScheduler()
        generate(pipe, 2)
        other = diffusers.StableDiffusionControlNetPipeline(
            **{**pipe.components, "scheduler": diffusers.DDIMScheduler()}, requires_safety_checker=False
        )
        generate(other, 2)
    assert {(site.hits, site.dense) for site in handle.report().sites} == {(2, 2)}


def test_a_replaced_controlnet_among_several_is_named():
    pipe = controlled([tiny_control.controlnet()[0] for _ in range(2)])
    with visattn.apply(pipe, "na(window=3x3)", strict=True):
        nets = [pipe.controlnet.nets[0], tiny_control.controlnet()[0]]
        pipe.controlnet = diffusers.models.controlnets.multicontrolnet.MultiControlNetModel(nets)
        with pytest.raises(ValueError, match=r"strict: controlnet.nets.1 of .* was replaced"):
            generate(pipe, 2)


def test_one_controlnet_for_two_pictures_is_patched_once():
    control, _ = tiny_control.controlnet()
    pipe = controlled([control, control])
    with visattn.apply(pipe, "na(window=3x3)", strict=True) as handle:
        generate(pipe, 2)
    found = {site.model: site.hits for site in handle.report().sites}
    assert found == {"unet": 2, "controlnet.nets.0": 4}


def test_a_controlnet_that_cannot_follow_is_named():
    control, _ = tiny_control.controlnet()
    pipe = controlled(control)
    with pytest.warns(UserWarning, match=r"controlnet keeps its attention: .*up_blocks"):
        handle = visattn.apply(pipe, "na(window=3x3)", layers=["up_blocks.*"])
    assert {site.model for site in handle.report().sites} == {"unet"}
    handle.remove()


def test_layers_shared_with_the_transformer_are_patched_once():
    transformer, inputs = tiny_models.z_image()
    control, control_inputs = tiny_control.z_image_control(transformer)
    pipe = object.__new__(diffusers.ZImageControlNetPipeline)
    for name, part in (("transformer", transformer), ("controlnet", control), ("scheduler", None)):
        object.__setattr__(pipe, name, part)
    before = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    handle = visattn.apply(pipe, "na(window=3x3)")
    sites = [(site.model, site.site) for site in handle.report().sites]
    assert len(set(sites)) == len(sites) == 3 + 2
    assert ("controlnet", "noise_refiner.0.attention") not in sites
    tiny_models.run(control, control_inputs)
    tiny_models.run(transformer, inputs)
    handle.remove()
    after = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_controlnet_with_linear_attention_is_refused_by_name():
    class SanaControlNetModel(torch.nn.Module):
        """As little as the name."""

    family = visattn.pipelines.families.find_family(SanaControlNetModel())
    assert "linear already" in family.nothing


@pytest.mark.parametrize("name", tiny_unets.VIDEO_UNETS)
def test_attention_over_frames_is_stock(name):
    """With as many frames as a level has tokens, the length of a sequence does not tell them apart."""
    build, sites, pattern = tiny_unets.VIDEO_UNETS[name]
    model, inputs = build(frames=30)
    with visattn.apply(model, pattern, strict=True) as handle:
        tiny_models.run(model, inputs)
        report = handle.report()
    assert report.hits == sites == len(report.sites)
    paths = [site.site for site in report.sites]
    assert not any("motion" in path or "temp" in path for path in paths)
    assert {c.problem.layout.grid for site in report.sites for c in site.calls} == {(12, 10), (6, 5)}


def test_frames_that_hide_later_ones_are_dense():
    model, inputs = tiny_models.skyreels()
    inputs |= {"hidden_states": tiny_models.noise(1, 4, 4, 12, 8)}
    with visattn.apply(model, "na(window=3x3x3)") as handle:
        model._set_ar_attention(2)
        with pytest.warns(UserWarning, match="differs from query to query"):
            tiny_models.run(model, inputs)
    assert not handle.report().hits and list(handle.report().fallbacks) == [
        "its mask [1, 1, 96, 96] differs from query to query"
    ]
