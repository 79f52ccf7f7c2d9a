"""Forwards of families of videos, drawn at random: as in `grid_inputs`."""

import math
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from tests.support.tiny import released
from visattn.layout import Layout


def video(case):
    grid = case.video()
    return {"hidden_states": case.empty(4, grid[0], 2 * grid[1] + 1, 2 * grid[2])}, Layout(grid)


def vace(case):
    args, layout = video(case)
    found, control = [], torch.ones(case.batch, 8, *args["hidden_states"].shape[2:], dtype=case.dtype)
    frames, *sizes = layout.grid
    for sample in control:
        references = case.draw(st.integers(0, frames - 1))
        sample[4:, :references] = 0
        found.append(Layout((frames - references, *sizes), references * math.prod(sizes)))
    args |= {"control_hidden_states": control}
    return args, tuple(found[:1]) if len(set(found)) == 1 else tuple(found)


def animate(case):
    args, layout = video(case)
    frames, *sizes = layout.grid
    args["hidden_states"] = case.empty(12, frames + 1, *args["hidden_states"].shape[3:])
    return args, Layout(layout.grid, math.prod(sizes))


def video_then_text(case):
    args, layout = video(case)
    return args | {"encoder_hidden_states": case.empty(case.text, 8)}, Layout(layout.grid, 0, case.text)


def cogvideox(case):
    grid = case.video()
    args = {"hidden_states": case.empty(grid[0], 4, 2 * grid[1], 2 * grid[2])}
    return args | {"encoder_hidden_states": case.empty(case.text, 8)}, Layout(grid, case.text)


def kandinsky(case):
    grid = case.video()
    return {"hidden_states": case.empty(grid[0], 2 * grid[1], 2 * grid[2], 4)}, Layout(grid)


def anyflow(case):
    grid = case.video()
    return {"hidden_states": case.empty(grid[0], 4, 2 * grid[1], 2 * grid[2])}, Layout(grid)


def latte(case):
    grid = case.image()
    return {"hidden_states": case.empty(4, 7, 2 * grid[0] + 1, 2 * grid[1])}, Layout(grid)


def easyanimate(case):
    args, layout = video(case)
    other = case.draw(st.integers(0, 3))
    args |= {"encoder_hidden_states": case.empty(case.text, 8)}
    if other:
        args["encoder_hidden_states_t5"] = case.empty(other, 8)
    return args, Layout(layout.grid, case.text + other)


def video_after_history(case):
    args, layout = video(case)
    return args, Layout(layout.grid, case.text)


def framepack(case):
    """History in three resolutions, padded to whole patches, each with its indices or left out."""
    args, layout = video(case)
    height, width = args["hidden_states"].shape[-2:]
    before = 0
    for name, scale in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        frames = case.draw(st.integers(1, 16))
        given = case.draw(st.sampled_from(["both", "latents alone", "none"]))
        if given != "none":
            args[name] = case.empty(4, frames, height // 2 * 2, width)
        if given == "both":
            args[f"indices_{name}"] = torch.arange(frames)
            before += math.ceil(frames / scale) * math.ceil(height // 2 / scale) * math.ceil(width / 2 / scale)
    return args, Layout(layout.grid, before, case.text)


def joy(case):
    """Latents of several images, the target the last, or of one."""
    grid = case.image()
    others = case.draw(st.integers(0, 2))
    shape = (4, 1, 2 * grid[0], 2 * grid[1])
    latents = case.empty(others + 1, *shape) if others else case.empty(*shape)
    args = {"hidden_states": latents, "encoder_hidden_states": case.empty(case.text, 8)}
    return args, Layout(grid, 0, others * math.prod(grid) + case.text)


def joy_plus(case):
    grids = [case.image() for _ in range(case.batch)]
    shapes = [[(1, *grid), *((1, *size) for size in case.references())] for grid in grids]
    length = max(sum(map(math.prod, sample)) for sample in shapes) + case.text
    found = tuple(Layout(grid, 0, length - math.prod(grid)) for grid in grids)
    return {"shape_list": shapes}, found[:1] if len(set(grids)) == 1 else found


def anyflow_far(case):
    args, layout = anyflow(case)
    cached, padding = case.draw(st.integers(0, 9)), -layout.tokens % 128
    args |= {"kv_cache": [], "kv_cache_flag": {"is_cache_step": False}}
    return args, Layout(layout.grid, cached, padding)


def cosmos_control(case):
    args, layout = video(case)
    return {"controls_latents": args["hidden_states"], "latents": case.empty(1)}, layout


def refined_chunk(case, rope_type):
    """A few frames, not all of them neighbours, somewhere in a video of minutes, behind a sink and history."""
    refiner = released("SanaWMLTX2RefinerTransformer3DModel")
    from diffusers.models.transformers import transformer_sana_wm_refiner as module

    grid = case.video()
    first, *gaps = (case.draw(st.integers(1, most)) for most in (900, *[4] * (grid[0] - 1)))
    frames = [first + sum(gaps[:i]) for i in range(grid[0])]
    rope = module.SanaWMLTX2AudioVideoRotaryPosEmbed(40, rope_type=rope_type, num_attention_heads=2)
    made = refiner.build_rotary_emb_for_absolute_positions(
        SimpleNamespace(rope=rope),
        case.batch,
        frames,
        *grid[1:],
        torch.device("cpu"),
        case.draw(st.sampled_from([8.0, 16.0, 24.0])),
    )
    return {"video_rotary_emb": tuple(t.to(case.dtype) for t in made)}, Layout(grid, case.text)
