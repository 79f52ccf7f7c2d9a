"""Forwards of every family, drawn at random: their arguments as pipelines make them, and the layout they mean."""

import math
from types import SimpleNamespace

import torch
from diffusers.models.transformers import transformer_ltx2
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from hypothesis import strategies as st

from tests.support.tiny import released
from tests.support.tiny_clips import minimax_layout
from visattn.layout import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EDGES = (1, 2, 3, 5, 16, 255, 256, 257, 258, 259, 300, 333, 512)


class Case:
    """One forward of a family, drawn: its arguments as pipelines make them, and the layout they mean."""

    def __init__(self, draw):
        self.dtype = draw(st.sampled_from(DTYPES))
        self.text = draw(st.integers(0, 9))
        self.batch = draw(st.integers(1, 2))
        self.draw = draw

    def image(self):
        sides = st.sampled_from(EDGES) | st.integers(1, 40)
        height, width = self.draw(sides), self.draw(sides)
        # Keep the number of tokens, and so the time, within bounds.
        return (height, width) if height * width <= 20_000 else (height, 3)

    def video(self):
        return tuple(self.draw(st.integers(1, most)) for most in (7, 9, 9))

    def references(self):
        return [self.image() for _ in range(self.draw(st.integers(0, 2)))]

    def empty(self, *shape):
        return torch.empty(self.batch, *shape, device="meta")


def flux_ids(case, grid, references, start=0):
    """As the pipelines of FLUX.1, Kontext and LongCat (whose ids start behind the text)."""
    every = []
    for image, (height, width) in enumerate([grid, *references]):
        ids = ChromaPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
        ids = ids.reshape(-1, 3) + torch.tensor([image, start, start])
        every.append(ids)
    return torch.cat(every).to(case.dtype)


def with_ids(case):
    grid, references = case.image(), case.references()
    ids = flux_ids(case, grid, references)
    args = {"img_ids": ids, "encoder_hidden_states": case.empty(case.text, 8)}
    return args, Layout(grid, case.text, len(ids) - math.prod(grid))


def flux2(case):
    grid, references = case.image(), case.references()
    ids = Flux2Pipeline._prepare_latent_ids(torch.empty(case.batch, 1, *grid))
    if references:
        images = [torch.empty(1, 1, *size) for size in references]
        ids = torch.cat([ids, Flux2Pipeline._prepare_image_ids(images).expand(case.batch, -1, -1)], 1)
    args = {"img_ids": ids.to(case.dtype), "encoder_hidden_states": case.empty(case.text, 8)}
    return args, Layout(grid, case.text, ids.shape[1] - math.prod(grid))


def qwen(case):
    grid, references = case.image(), case.references()
    shapes = [[(1, *grid), *((1, *size) for size in references)]] * case.batch
    args = {"img_shapes": shapes, "encoder_hidden_states": case.empty(case.text, 8)}
    return args, Layout(grid, case.text, sum(map(math.prod, references)))


def latents(case):
    grid = case.image()
    return {"hidden_states": case.empty(4, 2 * grid[0] + 1, 2 * grid[1])}, Layout(grid)


def latents_then_text(case):
    args, layout = latents(case)
    return args | {"encoder_hidden_states": case.empty(case.text, 8)}, Layout(layout.grid, 0, case.text)


def text_then_latents(case):
    args, layout = latents_then_text(case)
    return args, Layout(layout.grid, case.text)


def auraflow(case):
    args, layout = text_then_latents(case)
    return args, Layout(layout.grid, 8 + case.text)


def ernie(case):
    args, layout = latents_then_text(case)
    return {"hidden_states": args["hidden_states"], "text_bth": args["encoder_hidden_states"]}, layout


def joint_ids(case):
    grid = case.image()
    ids = released("Krea2Pipeline").prepare_position_ids(case.text, *grid, "cpu")
    args = {"position_ids": ids.to(case.dtype), "encoder_hidden_states": case.empty(case.text, 3, 8)}
    return args, Layout(grid, case.text)


def scaled_ids(case):
    released("Flux3Transformer2DModel")
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids as flux3_image_ids

    grid, references = case.image(), case.references()
    ids = flux3_image_ids(*grid, case.draw(st.sampled_from([0.5, 1.0, 2.0])))
    args = {"img_ids": ids.to(case.dtype), "encoder_hidden_states": case.empty(case.text, 8)}
    after = sum(map(math.prod, references))
    if references:
        args["image_cond_hidden_states"] = case.empty(after, 8)
    return args, Layout(grid, case.text, after)


def packed_ids(case):
    """The second forward of classifier-free guidance holds the image alone."""
    grid = case.image()
    lengths = [case.draw(st.integers(0, 9)) for _ in range(case.batch)]
    ids, *_ = released("Ideogram4Pipeline")._prepare_ids(lengths, *grid, max(lengths), "cpu")
    alone = case.draw(st.booleans())
    args = {"position_ids": ids[:, max(lengths) :] if alone else ids}
    return args, Layout(grid, 0 if alone else max(lengths))


def unet(case):
    grid = case.image()
    level = case.draw(st.integers(0, 2))
    halved = tuple(math.ceil(n / 2**level) for n in grid)
    return {"sample": case.empty(4, *grid)}, Layout(halved)


def floored(case):
    grid = case.image()
    level = case.draw(st.integers(0, 2))
    halved = tuple(n // 2**level for n in grid)
    return {"sample": case.empty(4, *grid)}, Layout(halved if min(halved) else grid)


def z_image(case):
    grids = [case.image() for _ in range(case.batch)]
    length = max(math.prod(grid) for grid in grids) + 32
    found = tuple(Layout(grid, 0, length - math.prod(grid)) for grid in grids)
    args = {"x": [torch.empty(4, 1, 2 * h, 2 * w, device="meta") for h, w in grids]}
    return args, found[:1] if len(set(grids)) == 1 else found


def lumina2(case):
    args, layout = latents(case)
    lengths = [case.draw(st.integers(0, 9)) for _ in range(case.batch)]
    longest = max(lengths)
    mask = torch.tensor([[True] * n + [False] * (longest - n) for n in lengths])
    found = tuple(Layout(layout.grid, n, longest - n) for n in lengths)
    return args | {"encoder_attention_mask": mask}, found[:1] if len(set(lengths)) == 1 else found


def hidream(case):
    args, layout = latents(case)
    return args, Layout(layout.grid, 0, case.text)


def packed_hidream(case):
    grids = [tuple(case.draw(st.integers(1, 20)) for _ in range(2)) for _ in range(case.batch)]
    longest = max(map(math.prod, grids)) + case.draw(st.integers(0, 50))
    ids = torch.zeros(case.batch, longest, 3)
    for row, (height, width) in zip(ids, grids, strict=True):
        row[: height * width] = flux_ids(case, (height, width), [])
    args = {"hidden_states": case.empty(longest, 8), "hidden_states_masks": case.empty(longest), "img_ids": ids}
    found = tuple(Layout(grid, 0, longest + case.text - math.prod(grid)) for grid in grids)
    return args, found[:1] if len(set(grids)) == 1 else found


def several_latents(case):
    grids = [case.image() for _ in range(case.batch)]
    length = max(map(math.prod, grids))
    found = tuple(Layout(grid, 0, length - math.prod(grid)) for grid in grids)
    args = {"hidden_states": [torch.empty(4, 2 * h, 2 * w, device="meta") for h, w in grids]}
    return args, found[:1] if len(set(grids)) == 1 else found


def codes_of_square(case):
    return {"hidden_states": case.empty(49)}, Layout((7, 7))


def unpatched(case):
    grid = case.image()
    return {"hidden_states": case.empty(4, *grid)}, Layout(grid)


def halved_codes(case):
    grid = case.image()
    return {"input_ids": case.empty(2 * grid[0], 2 * grid[1])}, Layout(grid)


def one_shape(case):
    grid = case.image()
    shape = (1, *grid)
    return {"img_shapes": case.draw(st.sampled_from([shape, [shape] * case.batch]))}, Layout(grid, 0, case.text)


def fibo2(case):
    """Either the number of gist tokens is the same for all samples, or the gist comes last."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    args, layout = latents(case)
    references = case.references()
    after, bounds = sum(map(math.prod, references)), {"min_gist": 4, "max_gist": 16, "gist_step": 4}
    args["context_latents"] = [case.empty(4, 2 * h, 2 * w) for h, w in references] or None
    texts = [case.draw(st.integers(1, 40)) for _ in range(case.batch)]
    args["encoder_hidden_states"] = case.empty(2, max(texts), 8)
    if case.draw(st.booleans()):
        args["encoder_attention_mask"] = torch.arange(max(texts)) < torch.tensor(texts)[:, None]
    else:
        texts = [max(texts)]
    gists = compute_gist_count(texts, **bounds, min_text_len=8, max_text_len=32)
    same = len(set(gists)) == 1
    before, behind = (gists[0], 0) if same else (0, max(gists))
    if same and case.draw(st.booleans()):
        # The layers before the gist joins.
        before = 0
    return args, Layout(layout.grid, before, after + behind)


def cosmos3(case):
    grid, after = case.video(), case.draw(st.integers(0, 9))
    args = {"vision_token_shapes": [grid], "und_len": case.text, "sequence_length": case.text + math.prod(grid) + after}
    return args, Layout(grid, case.text, after)


def qwen21(case):
    """Each 2 x 2 tokens of a reference image have a place in the text."""
    grid, references = case.image(), [(2 * h, 2 * w) for h, w in case.references()]
    slots = sum(h * w // 4 for h, w in references)
    args = {
        "img_shapes": [[(1, *image) for image in (*references, grid)]] * case.batch,
        "encoder_hidden_states": case.empty(case.text + slots, 8),
    }
    return args, Layout(grid, case.text + 4 * slots)


def cascade(case):
    grid = case.image()
    level = case.draw(st.integers(0, 2))
    after, args = 4 * 2, {"sample": case.empty(4, *grid), "clip_text_pooled": case.empty(2, 8)}
    if case.draw(st.booleans()):
        args |= {"clip_text": case.empty(case.text, 8), "clip_img": case.empty(1, 8)}
        after += case.text + 4
    halved = tuple(max(n // 2**level, 1) for n in grid)
    return args, Layout(halved if min(n // 2**level for n in grid) else grid, 0, after)


def cached_keys(case):
    """Keys of reference images, which are cached, before those of text and image."""
    args, layout = text_then_latents(case)
    cached = case.draw(st.integers(0, 9))
    mode = case.draw(st.sampled_from(["read", "skip"]))
    before = case.text + (cached if mode == "read" else 0)
    return args | {"kv_caches": [SimpleNamespace(mode=mode)]}, Layout(layout.grid, before)


def minimax(case):
    grid = case.video()
    anchors = case.draw(st.sampled_from([(), ("first",), ("first", "last")]))
    sound = case.draw(st.integers(1, 9))
    args = minimax_layout(anchors, case.text, grid, sound)
    return args, Layout(grid, len(args["position_ids"]) - math.prod(grid))


def control_without_text(case):
    args, layout = latents(case)
    control = {"hidden_states": case.empty(layout.tokens, 8), "controlnet_cond": args["hidden_states"]}
    return control, layout


def with_mode(case):
    args, layout = with_ids(case)
    return args, Layout(layout.grid, layout.prefix + 1, layout.suffix)


def frames(case):
    args, layout = unet(case)
    # AnimateDiff's frames are an axis behind the channels, those of Stable Video Diffusion before them.
    return {"sample": args["sample"][:, None].expand(-1, 7, -1, -1, -1)}, layout


def sizes(case):
    grid = case.video()
    return dict(zip(("num_frames", "height", "width"), grid, strict=True)), Layout(grid)


def ltx_condition(case):
    """Conditions of later frames stand before the video, as LTXConditionPipeline puts them."""
    grid = case.video()

    def ids(frames, index):
        found = LTXConditionPipeline._prepare_video_ids(case.batch, frames, *grid[1:])
        return LTXConditionPipeline._scale_video_ids(found, frame_index=index)

    conditions = [ids(1, 8 * i + 1) for i in range(case.draw(st.integers(0, min(2, grid[0] - 1))))]
    coordinates = torch.cat([*conditions, ids(grid[0], 0)], 2).float()
    coordinates[:, 0] *= 1 / 25
    return {"video_coords": coordinates.to(case.dtype)}, Layout(grid, coordinates.shape[2] - math.prod(grid))


def ltx2_coordinates(case):
    """Keyframes and references stand after the video, as LTX2ConditionPipeline and the DFR pipelines put them."""
    grid = tuple(n + 1 for n in case.video())
    rope = transformer_ltx2.LTX2AudioVideoRotaryPosEmbed(12)
    every = [rope.prepare_video_coords(case.batch, *grid, "cpu", fps=25.0)]
    if case.draw(st.booleans()):
        # A keyframe at the last pixel of the video, where it could be taken for one more frame.
        keyframe = rope.prepare_video_coords(case.batch, 1, *grid[1:], "cpu", fps=25.0)
        keyframe[:, 0] += 8 * (grid[0] - 1) / 25
        every.append(keyframe)
    if case.draw(st.booleans()):
        every.append(rope.prepare_video_coords(case.batch, *grid, "cpu", fps=25.0) * 2)
    coordinates = torch.cat(every, 2)
    given = sizes_of(grid) if case.draw(st.booleans()) else {}
    return {"video_coords": coordinates, **given}, Layout(grid, 0, coordinates.shape[2] - math.prod(grid))


def sizes_of(grid):
    return dict(zip(("num_frames", "height", "width"), grid, strict=True))
