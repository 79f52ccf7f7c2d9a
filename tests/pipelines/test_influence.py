"""A changed token changes exactly the tokens whose window holds it: sites, prefix, order and axes are right."""

import math
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_models
from tests.support.window_mask import window_mask
from visattn.pipelines.families import find_family


class Place(NamedTuple):
    """Where a model takes and returns the tokens of its grid.

    Attributes:
        grid: Tokens per axis.
        axes: Of the argument; N are tokens in raster order, I images, of which the last counts.
        patch: Latents per token and axis.
        name: The argument.
        returned: Axes of what comes back, those of the argument by default.
        start: Index of the first token of the grid among N, or of its first frame.
    """

    grid: tuple[int, ...]
    axes: str
    patch: tuple[int, ...] = (2, 2)
    name: str = "hidden_states"
    returned: str = ""
    start: int = 0


IMAGE, TOKENS = Place((6, 8), "BCHW"), Place((6, 8), "BNC")
VIDEO = Place((3, 6, 4), "BCFHW", (1, 2, 2))
SINGLE = Place((3, 4, 6), "BCFHW", (1, 1, 1))
COG = Place((3, 4, 4), "BFCHW", (1, 2, 2))
COSMOS = Place((3, 4, 6), "BCFHW", (1, 2, 2))
PACKED = Place((3, 4, 6), "BNC")
Z_IMAGE = Place((6, 8), "CFHW", name="x")
# By tiny model; UNets, whose convolutions carry a change everywhere, are below. Decoder layers of Motif-Video see the
# clip a second time.
PLACES = {
    "dit": Place((8, 8), "BCHW"),
    "pixart": IMAGE,
    "sd3": IMAGE,
    "flux": TOKENS,
    "flux2": TOKENS,
    "chroma": TOKENS,
    "bria": TOKENS,
    "qwen": TOKENS,
    "z_image": Z_IMAGE,
    "lumina2": IMAGE,
    "hidream": Place((6, 6), "BCHW"),
    "wan": VIDEO,
    "wan_animate": Place((2, 6, 4), "BCFHW", (1, 2, 2), start=1),
    "wan_vace": VIDEO,
    "hunyuan_video": SINGLE,
    "hunyuan_video15": SINGLE,
    "cogvideox": COG,
    "mochi": Place((3, 4, 4), "BCFHW", (1, 2, 2)),
    "ltx": PACKED,
    "ltx2": PACKED,
    "cosmos": COSMOS,
    "kandinsky5": Place((3, 4, 6), "BFHWC", (1, 2, 2)),
    "hunyuan_dit": IMAGE,
    "longcat": TOKENS,
    "ovis": TOKENS,
    "bria_fibo": TOKENS,
    "skyreels": VIDEO,
    "chronoedit": VIDEO,
    "consisid": COG,
    "cogview4": IMAGE,
    "cogview3": IMAGE,
    "auraflow": IMAGE,
    "ernie": IMAGE,
    "glm_image": IMAGE,
    "krea2": TOKENS,
    "flux3": TOKENS,
    "ideogram4": Place((6, 8), "BNC", start=5),
    "hunyuan_image": IMAGE,
    "hunyuan_image_refiner": COSMOS,
    "allegro": VIDEO,
    "latte": Place((6, 6), "BCFHW"),
    "anyflow": Place((3, 6, 4), "BFCHW", (1, 2, 2)),
    "anyflow_far": Place((3, 6, 4), "BFCHW", (1, 2, 2)),
    "sana_wm_refiner": Place((3, 6, 4), "BNC"),
    "easyanimate": VIDEO,
    "kandinsky6": Place((3, 6, 4), "BFHWC", (1, 2, 2)),
    "helios": VIDEO,
    "framepack": VIDEO,
    "motif": VIDEO,
    "minimax_h3": Place((3, 6, 4), "BNC", start=24),
    "joy_image": Place((6, 8), "BICFHW"),
    "joy_image_plus": TOKENS,
    "lumina_next": IMAGE,
    "prx": IMAGE,
    "nucleus": TOKENS,
    "fibo2": IMAGE,
    "omnigen": IMAGE,
    "cosmos3": Place((3, 4, 6), "BCFHW", (1, 2, 2), name="vision_tokens"),
    "qwen21": TOKENS._replace(start=-48),
    "flux_control": TOKENS,
    "flux_control_union": TOKENS,
    "sd3_control": Place((6, 8), "BCHW", returned="BNC"),
    "qwen_control": TOKENS,
    "z_image_control": Z_IMAGE._replace(returned="BNC"),
    "cosmos_control": Place((3, 4, 6), "BCFHW", (1, 2, 2), "controls_latents", "BNC"),
    "hunyuan_dit_control": Place((6, 8), "BCHW", returned="BNC"),
}


def leave_one_layer(model):
    """Leave only the last block with visual self-attention, in which text and references have joined."""
    blocks = [_block(site.path) for site, _ in find_family(model).find_sites(model)]
    for name in dict.fromkeys(name for name, _ in blocks):
        inside = model.get_submodule(name)
        kept = [inside[index] for index in {blocks[-1][1]} if name == blocks[-1][0]]
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.ModuleList(kept))
    if hasattr(model, "vace_blocks"):
        model.register_to_config(vace_layers=())
    if hasattr(model, "add_control_noise_refiner"):
        model.add_control_noise_refiner = None


def _block(path):
    """The list of blocks in which a module stands, and the index of its block."""
    parts = path.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:index]), int(parts[index])


def at(place, axes, token):
    """The index of a token of the last sample in a tensor with these axes."""
    if "N" in axes:
        return (-1, place.start + token)
    where = {"B": -1, "I": -1, "C": slice(None), "F": slice(None)}
    spatial = [axis for axis in axes if axis in "FHW"][-len(place.grid) :]
    for axis, i, size in zip(spatial, coordinates(token, place.grid), place.patch, strict=True):
        i += place.start if axis == "F" else 0
        where[axis] = slice(i * size, (i + 1) * size)
    return tuple(where[axis] for axis in axes)


def coordinates(token, grid):
    """The coordinates of a token."""
    place = []
    for n in reversed(grid):
        token, rest = divmod(token, n)
        place.insert(0, rest)
    return place


def predicted(model, inputs):
    """What a model predicts; of the outputs of a ControlNet the first."""
    with torch.no_grad():
        sample = model(**inputs)
    while not isinstance(sample, torch.Tensor):
        sample = next(iter(sample.values() if isinstance(sample, dict) else sample))
    return sample


def reached(place, before, after):
    """Which tokens differ."""
    axes = place.returned or place.axes
    different = before != after
    tokens = range(math.prod(place.grid))
    return torch.stack([different[at(place, axes, token)].any() for token in tokens])


@pytest.mark.parametrize("name", PLACES)
def test_a_token_reaches_the_queries_whose_window_holds_it(name):
    place = PLACES[name]
    build, _, pattern = tiny_models.FAMILIES[name]
    model, inputs = build()
    leave_one_layer(model)
    # There are no layers of control left to scale.
    inputs.pop("control_hidden_states_scale", None)
    if "kv_cache_mode" in inputs:
        inputs["kv_cache"].layer_caches = inputs["kv_cache"].layer_caches[:1]
    latents = inputs[place.name]
    stock = predicted(model, inputs)
    handle = visattn.apply(model, pattern, strict=True)
    before = predicted(model, inputs)
    tokens = math.prod(place.grid)
    for token in (0, round(0.4 * tokens), tokens - 1):
        if isinstance(latents, list):
            *others, last = latents
            changed = [*others, last.clone()]
            changed[-1][at(place, place.axes, token)] += 3
        else:
            changed = latents.clone()
            changed[at(place, place.axes, token)] += 3
        after = predicted(model, {**inputs, place.name: changed})
        expected = window_mask(place.grid, (3,) * len(place.grid), 0, 0)[:, token]
        assert torch.equal(reached(place, before, after), expected), token
    handle.remove()
    assert reached(place, stock, predicted(model, {**inputs, place.name: changed})).all()


# Grid of the first block that attends to its tokens once, by tiny model with convolutions.
UNETS = {
    "sd15": (12, 10),
    "sdxl": (8, 7),
    "motion": (12, 10),
    "svd": (12, 10),
    "unet3d": (12, 10),
    "i2vgen": (12, 10),
    "controlnet": (12, 10),
    "controlnet_union": (16, 14),
    "controlnet_xs": (12, 10),
    "sparse_control": (12, 10),
    "audioldm2": (12, 10),
    "unconditional": (12, 20),
    "kandinsky3": (12, 8),
    "stable_cascade": (13, 11),
    "transformer2d": (6, 8),
    "vq_diffusion": (7, 7),
    "amused": (6, 8),
    "sana_wm": (3, 6, 4),
}


def first_block(model):
    """The first block around one visual self-attention, or that itself, without norms over all tokens."""
    if type(model).__name__ == "SanaWMTransformer3DModel":
        # Its two branches attend side by side.
        return model.get_submodule("blocks.1.attn")
    paths = [site.path for site, _ in find_family(model).find_sites(model)]
    parents = [path.rpartition(".")[0] for path in paths]
    path, parent = next(pair for pair in zip(paths, parents, strict=True) if parents.count(pair[1]) == 1)
    block = model.get_submodule(parent)
    if isinstance(block, torch.nn.ModuleList):
        block = model.get_submodule(path)
        block.group_norm = None
    for part in list(block.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(part, name, torch.nn.Identity())
    return block


@pytest.mark.parametrize("name", UNETS)
def test_a_token_of_a_block_reaches_the_queries_whose_window_holds_it(name):
    grid = UNETS[name]
    build, _, pattern = tiny_models.FAMILIES[name]
    model, inputs = build()
    block, tokens, outputs = first_block(model), math.prod(grid), []

    def change(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        # Norms remove what all channels have in common.
        (x if x.ndim == 3 else x.flatten(2).transpose(1, 2))[-1, token, ::2] += 3
        return ((x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": x})

    def keep(module, args, out):
        outputs.append(out if out.ndim == 3 else out.flatten(2).transpose(1, 2))

    with visattn.apply(model, pattern, strict=True):
        hooks = [block.register_forward_hook(keep)]
        predicted(model, inputs)
        hooks.append(block.register_forward_pre_hook(change, with_kwargs=True))
        for token in (0, round(0.4 * tokens), tokens - 1):  # noqa: B007 - `change` reads it
            predicted(model, inputs)
    for hook in hooks:
        hook.remove()
    for out, token in zip(outputs[1:], (0, round(0.4 * tokens), tokens - 1), strict=True):
        changed = (out[-1] != outputs[0][-1]).any(1)
        assert torch.equal(changed, window_mask(grid, (3,) * len(grid), 0, 0)[:, token]), token
    assert {len(out[-1]) for out in outputs} == {tokens}


def test_every_tiny_model_has_an_influence_test():
    # Decoder layers of Motif-Video see the clip a second time.
    assert {*PLACES, *UNETS, "motif_decoder"} == set(tiny_models.FAMILIES)
