"""Where the tokens are: every family's grid against the position ids, coordinates and sizes that pipelines make."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")

import diffusers
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline

import visattn
from tests.support import tiny_models, tiny_pipelines
from tests.support.grid_inputs import Case, flux_ids
from tests.support.grids import CASES
from visattn.layout import Layout
from visattn.pipelines import families
from visattn.pipelines.families import raster
from visattn.runtime.where import Where


def record(name):
    return families.FAMILIES[name]


def layouts(name, config, args, length):
    """What a record makes of the arguments of a forward, for a sequence of `length` tokens."""
    family = record(name)
    seen = family.seen(config, args)
    if family.read is not None and seen.ids is not None:
        seen = family.read(config, seen.ids, seen)
    known = seen.grid, seen.prefix, seen.suffix, family.levels, seen.why, seen.samples
    return Where(*known, early=family.early).layouts(length)


def test_every_class_has_a_case():
    named = {name.partition(",")[0] for name in CASES}
    assert named == {name for name, family in families.FAMILIES.items() if not family.nothing}


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_the_grid_is_that_of_the_ids_coordinates_and_sizes(name, data):
    config, draw = CASES[name]
    args, expected = draw(Case(data.draw))
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert layouts(name.partition(",")[0], config, args, expected[0].length) == expected
    # Any other length is none of this forward, unless the rest is open or a grid of its own.
    found = layouts(name.partition(",")[0], config, args, 1_000_003)
    if isinstance(found, tuple):
        assert all(layout.length == 1_000_003 for layout in found)


@given(data=st.data())
def test_ids_of_no_grid_leave_the_call_dense(data):
    case = Case(data.draw)
    height, width = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    ids = flux_ids(case, (height, width), [])
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    grid = raster.whole(ids[order][:, 1:])
    # Two axes may change places, which is another grid; anything else is none.
    assert grid in (None, (height, width)) or torch.equal(order, torch.arange(len(ids)))
    if grid is not None:
        assert torch.equal(ids[order], ids)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda ids: ids.flip(0), "not those of a grid in raster order"),
        (lambda ids: ids[:-1], "not those of a grid in raster order"),
        (lambda ids: torch.cat([ids, ids + torch.tensor([1, 0, 0]), ids]), "not those of a grid in raster order"),
        (lambda ids: torch.stack([ids, ids.flip(0)]), "the position ids of its samples differ"),
    ],
    ids=["reversed", "a token is missing", "the image in two pieces", "samples that differ"],
)
def test_ids_that_are_no_raster_are_named(spoil, why):
    args = {"img_ids": spoil(tiny_models.flux_ids(4, 9)), "encoder_hidden_states": torch.empty(2, 5, 8)}
    found = layouts("FluxTransformer2DModel", None, args, 41)
    assert isinstance(found, str) and why in found


def test_samples_of_qwen_with_several_sizes_are_named():
    args = {"img_shapes": [[(1, 4, 9)], [(1, 9, 4)]], "encoder_hidden_states": torch.empty(2, 5, 8)}
    assert "the sizes of its samples differ" in layouts("QwenImageTransformer2DModel", None, args, 41)


def test_scaled_and_shifted_ids_are_grids_too():
    ids = tiny_models.flux_ids(4, 9)[:, 1:] * 1.75 + 512
    assert raster.whole(ids) == (4, 9)
    assert raster.whole(torch.zeros(4, 2)) is None
    assert raster.largest(torch.cat([torch.zeros(3, 2), ids, torch.zeros(50, 2)])) == raster.Block(3, (4, 9))


def test_wide_flux_in_bfloat16_is_sparse():
    pipe, _ = tiny_pipelines.flux()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.bfloat16)
    with visattn.apply(pipe, "na(window=3x3)", strict=True) as handle:
        pipe("a cat", height=4, width=600, num_inference_steps=1, max_sequence_length=8, output_type="latent")
    assert {str(c.problem.layout) for site in handle.report().sites for c in site.calls} == {"2x300, prefix 8"}


def same_as_with_layout(model, inputs, layout, pattern="na(window=3x3x3)"):
    """Whether a model finds by itself what a layout given by hand says."""
    with visattn.apply(model, pattern, strict=True) as handle:
        found = tiny_models.run(model, inputs)
    assert {c.problem.layout for site in handle.report().sites for c in site.calls} == {layout}
    with visattn.apply(model, pattern, strict=True, layout=layout):
        return torch.equal(tiny_models.run(model, inputs), found)


def test_reference_frames_of_vace_are_a_prefix():
    model, inputs = tiny_models.wan_vace()
    control = tiny_models.noise(1, 8, 5, 12, 8, seed=4)
    control[:, 4:, :2] = 0
    inputs |= {"hidden_states": tiny_models.noise(1, 4, 5, 12, 8), "control_hidden_states": control}
    assert same_as_with_layout(model, inputs, Layout((3, 6, 4), prefix=48))


def test_reference_frames_as_the_pipeline_of_vace_makes_them():
    """Of the pipeline only what prepares the control, with the VAE's latents as they come."""
    pipe = object.__new__(diffusers.WanVACEPipeline)
    wan, _ = tiny_pipelines.wan()
    object.__setattr__(pipe, "vae", wan.vae)
    object.__setattr__(pipe, "transformer", wan.transformer)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    images = [tiny_models.noise(3, 32, 32, seed=seed) for seed in (1, 2)]
    clip, mask = torch.zeros(1, 3, 9, 32, 32), torch.zeros(1, 3, 9, 32, 32)
    with torch.no_grad():
        control = pipe.prepare_video_latents(clip, mask, [images], None, torch.device("cpu"))
    control = torch.cat([control, pipe.prepare_masks(mask, [images])], 1)
    assert control.shape[2] == 5
    config = SimpleNamespace(patch_size=(1, 2, 2), in_channels=wan.vae.config.z_dim)
    args = {"hidden_states": torch.empty(1, 16, *control.shape[2:]), "control_hidden_states": control}
    grid = (3, control.shape[3] // 2, control.shape[4] // 2)
    prefix = 2 * math.prod(grid[1:])
    assert layouts("WanVACETransformer3DModel", config, args, 5 * prefix // 2) == (Layout(grid, prefix),)


def test_reference_frame_of_animate_is_a_prefix():
    model, inputs = tiny_models.wan_animate()
    assert same_as_with_layout(model, inputs, Layout((2, 6, 4), prefix=24))


def test_ltx_takes_the_grid_from_coordinates():
    model, inputs = tiny_models.ltx()
    for name in ("num_frames", "height", "width"):
        inputs[name] = 1
    ids = LTXConditionPipeline._prepare_video_ids(1, 3, 4, 6)
    keyframe = LTXConditionPipeline._prepare_video_ids(1, 1, 4, 6)
    keyframe[:, 0] = 2
    inputs["video_coords"] = torch.cat([keyframe, ids], 2).float()
    inputs["hidden_states"] = tiny_models.noise(1, 4 * 4 * 6, 4)
    assert same_as_with_layout(model, inputs, Layout((3, 4, 6), prefix=24))


def test_ltx_samples_with_several_coordinates_are_named():
    model, inputs = tiny_models.ltx()
    coordinates = LTXConditionPipeline._prepare_video_ids(1, 3, 4, 6).float()
    args = inputs | {"video_coords": torch.cat([coordinates, coordinates * 2])}
    assert "the coordinates of its samples differ" in layouts("LTXVideoTransformer3DModel", model.config, args, 72)


def test_images_of_several_sizes_have_a_grid_each():
    model, inputs = tiny_models.z_image()
    inputs |= {"x": [tiny_models.noise(4, 1, 8, 18), tiny_models.noise(4, 1, 12, 6)], "t": torch.tensor([0.5, 0.5])}
    inputs["cap_feats"] = [tiny_models.noise(7, 16, seed=2), tiny_models.noise(9, 16, seed=3)]

    def samples():
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        together = samples()
        layouts = {c.problem.layout.grid for site in handle.report().sites for c in site.calls}
    assert layouts == {(4, 9), (6, 3)}
    everything = dict(inputs)
    for i, both in enumerate(together):
        inputs = everything | {name: everything[name][i : i + 1] for name in ("x", "t", "cap_feats")}
        with visattn.apply(model, "na(window=3x3)", strict=True):
            torch.testing.assert_close(samples()[0], both, rtol=1e-4, atol=1e-5)


def test_cross_attention_at_the_paths_of_self_attention_is_left_out():
    model, _ = tiny_models.sd15()
    options = {**model.config, "only_cross_attention": (True, False)}
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    upscaler = tiny_models.seeded(diffusers.UNet2DConditionModel, **options)
    found = [site.path for site, _ in record("UNet2DConditionModel").find_sites(upscaler)]
    assert found and not any(path.startswith("down_blocks.0") for path in found)


def test_position_ids_are_read_inside_of_torch_func():
    model, inputs = tiny_models.flux()
    visattn.apply(model, "na(window=3)", strict=True)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (), inputs).sample.square().mean())(weights)
    model(**inputs).sample.square().mean().backward()
    for name, value in model.named_parameters():
        assert value.grad is None or torch.allclose(found[name], value.grad, atol=1e-6), name


def test_position_ids_without_values_say_so():
    model, inputs = tiny_models.flux()
    visattn.apply(model.to("meta"), "na(window=3)")
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), pytest.warns(UserWarning, match="its position ids are meta tensors, which have no values"):
        assert model(**meta).sample.shape == inputs["hidden_states"].shape
