"""Every model family: dense is stock to the bit, sparse reaches every module, undo restores by identity."""

import math

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import visattn
import visattn.pipelines.families
from tests.support import tiny_clips, tiny_control, tiny_edits, tiny_models, tiny_text_images, tiny_unets
from tests.support.window_mask import window_mask


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request):
    build, sites, pattern = tiny_models.FAMILIES[request.param]
    model, inputs = build()
    return model, inputs, sites, pattern


def state(model):
    """Everything that a patch may touch, by identity."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            found[name] = module.processor, getattr(module.processor, "_attention_backend", None)
        hooks = module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs
        found[name, "hooks"] = [list(h.values()) for h in hooks], hasattr(module, "_diffusers_hook")
    return found


def same(before, after):
    return before.keys() == after.keys() and all(
        all(a is b if not isinstance(a, list) else a == b for a, b in zip(before[k], after[k], strict=True))
        for k in before
    )


def test_dense_is_stock_sparse_is_everywhere_and_undo_restores(family):
    model, inputs, sites, pattern = family
    stock, before = tiny_models.run(model, inputs), state(model)
    # Mochi attends sample by sample, and its batch here has two.
    calls = sites * (2 if isinstance(model, diffusers.MochiTransformer3DModel) else 1)

    with visattn.apply(model, "dense") as handle:
        assert torch.equal(tiny_models.run(model, inputs), stock)
        report = handle.report()
    assert len(report.sites) == sites and report.dense == calls and not report.fallbacks

    with visattn.apply(model, "na(window=-1)", strict=True) as handle:
        assert torch.equal(tiny_models.run(model, inputs), stock)
        report = handle.report()
    assert report.sites_hit == sites and report.density == 1
    assert {site.calls[0].backend for site in report.sites} == {"stock"}

    with visattn.apply(model, pattern, strict=True) as handle:
        sparse = tiny_models.run(model, inputs)
        report = handle.report()
    assert report.sites_hit == sites and report.hits == calls
    assert not report.fallbacks and not report.dense
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, stock)

    handle.remove()
    assert same(before, state(model))
    assert torch.equal(tiny_models.run(model, inputs), stock)


# One of each kind: builder, and by length of a sequence its grid and the tokens before and after.
KINDS = {
    "text first": (tiny_models.flux, {53: ((6, 8), 5, 0)}),
    "reference images": (lambda: tiny_models.flux(reference=(2, 3)), {59: ((6, 8), 5, 6)}),
    "reference images of FLUX.2": (lambda: tiny_models.flux2(reference=(2, 3)), {59: ((6, 8), 5, 6)}),
    "reference images of Qwen": (lambda: tiny_models.qwen(references=((1, 2, 3),)), {61: ((6, 8), 7, 6)}),
    "text last": (tiny_models.sd3, {53: ((6, 8), 0, 5), 48: ((6, 8), 0, 0)}),
    "video": (tiny_models.wan, {72: ((3, 6, 4), 0, 0)}),
    "video after text": (tiny_models.cogvideox, {56: ((3, 4, 4), 8, 0)}),
    "unet": (tiny_models.sd15, {120: ((12, 10), 0, 0), 30: ((6, 5), 0, 0)}),
    "padded text": (lambda: tiny_models.qwen(padded=True), {55: ((6, 8), 7, 0)}),
    "padded text after video": (tiny_models.hunyuan_video, {79: ((3, 4, 6), 0, 7)}),
    "product mask": (tiny_models.hunyuan_video15, {87: ((3, 4, 6), 0, 15)}),
    "text of each sample": (tiny_models.mochi, {52: ((3, 4, 4), 0, 4), 55: ((3, 4, 4), 0, 7)}),
    "padding between": (tiny_models.z_image, {64: ((6, 8), 0, 16), 96: ((6, 8), 0, 48)}),
    "captions": (tiny_models.lumina2, {53: ((6, 8), 5, 0), 48: ((6, 8), 0, 0)}),
    "frames of a UNet": (tiny_unets.motion, {120: ((12, 10), 0, 0), 30: ((6, 5), 0, 0)}),
    "frames of Stable Video Diffusion": (tiny_unets.svd, {120: ((12, 10), 0, 0), 30: ((6, 5), 0, 0)}),
    "ids behind the text": (tiny_models.longcat, {59: ((6, 8), 5, 6)}),
    "references of FIBO": (tiny_models.bria_fibo, {59: ((6, 8), 5, 6)}),
    "identity beside video": (tiny_models.consisid, {56: ((3, 4, 4), 8, 0)}),
    "skips between blocks": (tiny_models.hunyuan_dit, {48: ((6, 8), 0, 0)}),
    "text before latents": (tiny_text_images.cogview4, {53: ((6, 8), 5, 0)}),
    "text before latents of CogView 3+": (tiny_text_images.cogview3, {53: ((6, 8), 5, 0)}),
    "glyphs before latents": (tiny_text_images.glm_image, {53: ((6, 8), 5, 0)}),
    "registers before text": (tiny_text_images.auraflow, {61: ((6, 8), 13, 0)}),
    "padded text after latents": (tiny_text_images.ernie, {53: ((6, 8), 0, 5)}),
    "ids of text and image": (tiny_text_images.krea2, {53: ((6, 8), 5, 0)}),
    "scaled ids": (tiny_text_images.flux3, {48: ((6, 8), 0, 0), 59: ((6, 8), 5, 6)}),
    "packed ids": (tiny_text_images.ideogram4, {53: ((6, 8), 5, 0)}),
    "two texts": (tiny_text_images.hunyuan_image, {57: ((6, 8), 0, 9)}),
    "frames of an image": (tiny_text_images.hunyuan_image_refiner, {77: ((3, 4, 6), 0, 5)}),
    "frames one by one": (lambda: tiny_clips.latte(frames=3), {36: ((6, 6), 0, 0)}),
    "frames before channels": (tiny_clips.anyflow, {72: ((3, 6, 4), 0, 0)}),
    "two texts before video": (tiny_clips.easyanimate, {82: ((3, 6, 4), 10, 0)}),
    "video beside sound": (tiny_clips.kandinsky6, {72: ((3, 6, 4), 0, 0)}),
    "history before video": (lambda: tiny_clips.helios(amplified=True), {104: ((3, 6, 4), 32, 0)}),
    "history, image and padded text": (tiny_clips.framepack, {114: ((3, 6, 4), 32, 10)}),
    "image and padded text after video": (tiny_clips.motif, {82: ((3, 6, 4), 0, 10)}),
    "the encoder's video after video": (
        lambda: tiny_clips.motif(decoder=1),
        {82: ((3, 6, 4), 0, 10), 144: ((3, 6, 4), 0, 72)},
    ),
    "text, keyframe and sound before video": (tiny_clips.minimax_h3, {109: ((3, 6, 4), 37, 0)}),
    "target before references and text": (tiny_edits.joy_image, {149: ((6, 8), 0, 101)}),
    "target before padded references and text": (tiny_edits.joy_image_plus, {65: ((6, 8), 0, 17)}),
    "mask with heads": (tiny_edits.lumina_next, {48: ((6, 8), 0, 0)}),
    "blocks alone": (tiny_edits.transformer2d, {48: ((6, 8), 0, 0)}),
    "codes": (tiny_edits.vq_diffusion, {49: ((7, 7), 0, 0)}),
    "halved codes": (tiny_edits.amused, {48: ((6, 8), 0, 0)}),
    "UNet without text": (
        tiny_unets.unconditional,
        {240: ((12, 20), 0, 0), 60: ((6, 10), 0, 0), 15: ((3, 5), 0, 0)},
    ),
    "time and frequency": (tiny_unets.audioldm2, {120: ((12, 10), 0, 0), 30: ((6, 5), 0, 0)}),
    "keys of text before those of the image": (tiny_edits.prx, {53: ((6, 8), 5, 0)}),
    "keys of text after those of the image": (tiny_edits.nucleus, {53: ((6, 8), 0, 5)}),
    "keys of CLIP at two levels": (tiny_edits.stable_cascade, {152: ((13, 11), 0, 9), 39: ((6, 5), 0, 9)}),
    "UNet whose levels are rounded down": (
        tiny_unets.kandinsky3,
        {96: ((12, 8), 0, 0), 24: ((6, 4), 0, 0), 6: ((3, 2), 0, 0)},
    ),
    "gist before the image": (tiny_edits.fibo2, {60: ((6, 8), 6, 6), 54: ((6, 8), 0, 6)}),
    "gist after the image": (lambda: tiny_edits.fibo2((5, 2)), {60: ((6, 8), 0, 12), 54: ((6, 8), 0, 6)}),
    "gist of a text without a mask": (
        lambda: tiny_edits.fibo2(references=(), mask=False),
        {54: ((6, 8), 6, 0), 48: ((6, 8), 0, 0)},
    ),
    "keys of text before video and sound": (tiny_edits.cosmos3, {81: ((3, 4, 6), 5, 4)}),
    "keys of text and reference images": (tiny_edits.qwen21, {61: ((6, 8), 13, 0)}),
    "control of a UNet": (tiny_control.controlnet, {120: ((12, 10), 0, 0), 30: ((6, 5), 0, 0)}),
    "control with a mode": (tiny_control.flux_control_union, {54: ((6, 8), 6, 0)}),
    "control before text": (tiny_control.sd3_control, {53: ((6, 8), 0, 5), 48: ((6, 8), 0, 0)}),
    "control with padding": (tiny_control.z_image_control, {64: ((6, 8), 0, 16), 96: ((6, 8), 0, 48)}),
    "control of video": (tiny_control.cosmos_control, {72: ((3, 4, 6), 0, 0)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_equals_masked_sdpa(kind, monkeypatch):
    """The whole model, stock, with the pattern's mask given to every call of SDPA that is visual self-attention."""
    build, layouts = KINDS[kind]
    model, inputs = build()
    dims = len(next(iter(layouts.values()))[0])
    with visattn.apply(model, f"na(window={'x'.join('3' * dims)})", strict=True, backend="reference"):
        sparse = tiny_models.run(model, inputs)
    real, masked = torch.nn.functional.scaled_dot_product_attention, []

    def with_mask(query, key, value, attn_mask=None, *args, **options):
        length = key.shape[2]
        grid, prefix, suffix = layouts.get(length, ((), 0, 0))
        if query.shape[2] in (length, length - prefix, math.prod(grid)) and grid:
            masked.append(length)
            ours = window_mask(grid, (3,) * dims, prefix, suffix)
            if query.shape[2] < length:
                # The further keys have no queries.
                ours = ours[prefix : prefix + query.shape[2]]
            attn_mask = ours if attn_mask is None else ours & attn_mask.bool()
        return real(query, key, value, attn_mask, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_mask)
    expected = tiny_models.run(model, inputs)
    assert set(masked) == set(layouts)
    torch.testing.assert_close(sparse, expected, rtol=2e-4, atol=2e-5)


def test_causal_text_keeps_its_mask(monkeypatch):
    """The image sees its window and the text; text, which is padded on the left, is causal."""
    model, inputs = tiny_edits.omnigen()
    real = torch.nn.functional.scaled_dot_product_attention
    with visattn.apply(model, "na(window=3x3)", strict=True, backend="reference"):
        sparse = tiny_models.run(model, inputs)

    def with_mask(query, key, value, attn_mask, *args, **options):
        ours = window_mask((6, 8), (3, 3), 6, 0).clone()
        ours[:6] = True
        return real(query, key, value, attn_mask.masked_fill(~ours, -float("inf")), *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", with_mask)
        expected = tiny_models.run(model, inputs)
    torch.testing.assert_close(sparse, expected, rtol=2e-4, atol=2e-5)
    with visattn.apply(model, "topk(keep=0.5)") as handle, pytest.warns(UserWarning, match="mask of its own"):
        tiny_models.run(model, inputs)
    assert sum(handle.report().fallbacks.values()) == 2


def test_a_chunk_sees_its_window_and_the_chunks_before_it(monkeypatch):
    """Its processor insists on flex attention, for which masked SDPA stands here."""
    model, inputs = tiny_clips.anyflow_far()
    with visattn.apply(model, "na(window=3x3x3)", strict=True, backend="reference"):
        sparse = tiny_models.run(model, inputs)
    from diffusers.models.transformers import transformer_anyflow_far as far

    real, masked = far.dispatch_attention_fn, []

    def with_mask(query, key, value, *args, scale=None, **options):
        if key.shape[1] != 54 + 72 + 56:
            return real(query, key, value, *args, scale=scale, **options)
        masked.append(query.shape[1])
        ours = window_mask((3, 6, 4), (3, 3, 3), 54, 56)[54:]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, ours, scale=scale).transpose(1, 2)

    monkeypatch.setattr(far, "dispatch_attention_fn", with_mask)
    torch.testing.assert_close(sparse, tiny_models.run(model, inputs), rtol=2e-4, atol=2e-5)
    assert masked == [128, 128]


def test_a_pattern_that_needs_a_query_for_each_key_gets_rows_of_zeros():
    model, inputs = tiny_edits.prx()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "topk(keep=1.0)", strict=True) as handle:
        torch.testing.assert_close(tiny_models.run(model, inputs), stock, rtol=2e-4, atol=2e-5)
    layouts = {str(call.problem.layout) for site in handle.report().modules for call in site.calls}
    assert layouts == {"6x8, prefix 5"}


def test_captions_of_different_length_run_sample_by_sample(monkeypatch):
    model, inputs = tiny_models.lumina2(lengths=(5, 3))
    with visattn.apply(model, "na(window=3x3)", strict=True, backend="reference") as handle:
        sparse = tiny_models.run(model, inputs)
        report = handle.report()
    layouts = {str(call.problem.layout) for site in report.modules for call in site.calls}
    assert len(layouts) == 3 and not report.fallbacks
    real, masked = torch.nn.functional.scaled_dot_product_attention, []

    def with_mask(query, key, value, attn_mask=None, *args, **options):
        length = query.shape[2]
        if length in (48, 53):
            masked.append(length)
            starts = (5, 3) if length == 53 else (0, 0)
            ours = torch.stack([window_mask((6, 8), (3, 3), n, length - 48 - n) for n in starts])[:, None]
            attn_mask = ours if attn_mask is None else ours & attn_mask.bool()
        return real(query, key, value, attn_mask, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_mask)
    expected = tiny_models.run(model, inputs)
    assert set(masked) == {48, 53}
    torch.testing.assert_close(sparse, expected, rtol=2e-4, atol=2e-5)


def test_padding_before_the_text_of_each_sample(monkeypatch):
    model, inputs = tiny_text_images.ideogram4(lengths=(5, 3))
    with visattn.apply(model, "na(window=3x3)", strict=True, backend="reference"):
        sparse = tiny_models.run(model, inputs)
    real, masked = torch.nn.functional.scaled_dot_product_attention, []

    def with_mask(query, key, value, attn_mask, *args, **options):
        masked.append(query.shape[2])
        return real(query, key, value, attn_mask & window_mask((6, 8), (3, 3), 5, 0), *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_mask)
    expected = tiny_models.run(model, inputs)
    assert masked == [53, 53]
    # What padding gets is of no use to anyone.
    torch.testing.assert_close(sparse[:, 5:], expected[:, 5:], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(sparse[0], expected[0], rtol=2e-4, atol=2e-5)


def test_packed_samples_that_do_not_end_with_images_of_one_size_are_dense():
    model, inputs = tiny_text_images.ideogram4()
    family = visattn.pipelines.families.find_family(model)
    for change in ("text behind the image", "another size", "no image"):
        ids = inputs["position_ids"].clone()
        if change == "text behind the image":
            ids[:, -1] = 7
        elif change == "another size":
            ids[1, 5:] = ids[1, 5:, [0, 2, 1]]
        else:
            ids[:] = 3
        seen = family.read(model.config, ids, family.seen(model.config, {"position_ids": ids}))
        assert not seen.grid and seen.why, change


def test_cached_keys_of_glm_image_are_seen_by_every_query(monkeypatch):
    """Editing: the reference image's keys stand before those of text and grid, and have no queries."""
    caches = pytest.importorskip("diffusers.models.transformers.transformer_glm_image")
    model, inputs = tiny_text_images.glm_image()
    cache = caches.GlmImageKVCache(2)
    cache.set_mode("write")
    reference = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :0], "kv_caches": cache}
    tiny_models.run(model, inputs, **reference)
    cache.set_mode("read")
    stock = tiny_models.run(model, inputs, kv_caches=cache)
    assert not torch.allclose(stock, tiny_models.run(model, inputs))
    with visattn.apply(model, "na(window=-1)", strict=True):
        assert torch.equal(tiny_models.run(model, inputs, kv_caches=cache), stock)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        sparse = tiny_models.run(model, inputs, kv_caches=cache)
        report = handle.report()
    assert {str(call.problem.layout) for site in report.sites for call in site.calls} == {
        "6x8, prefix 5 with keys on 6x8, prefix 53"
    }
    real = torch.nn.functional.scaled_dot_product_attention

    def with_window(query, key, value, attn_mask=None, *args, **options):
        assert (query.shape[2], key.shape[2]) == (53, 101) and attn_mask is None
        return real(query, key, value, window_mask((6, 8), (3, 3), 53, 0)[48:], *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_window)
    expected = tiny_models.run(model, inputs, kv_caches=cache)
    torch.testing.assert_close(sparse, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_where_keys_are_more_than_queries(compiled, monkeypatch):
    model, inputs = tiny_edits.prx()
    weights = [model.blocks[0].attention.img_qkv_proj.weight, model.blocks[0].attention.txt_kv_proj.weight]

    def gradients(model):
        return torch.autograd.grad(model(**inputs).sample.square().sum(), weights)

    with visattn.apply(model, "na(window=3x3)", strict=not compiled):
        run = torch.compile(model, backend="aot_eager") if compiled else model
        found = gradients(run)
    torch._dynamo.reset()
    real = torch.nn.functional.scaled_dot_product_attention

    def with_window(query, key, value, attn_mask, *args, **options):
        return real(query, key, value, attn_mask & window_mask((6, 8), (3, 3), 5, 0)[5:], *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_window)
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def test_queries_that_are_neither_the_grid_nor_the_end_keep_the_call_stock():
    from visattn.layout import Layout
    from visattn.runtime.sequences import query_rows

    assert query_rows(48, Layout((6, 8), 5, 7)) == slice(5, 53)
    assert query_rows(53, Layout((6, 8), 9)) == slice(4, 57)
    assert query_rows(55, Layout((6, 8), 5, 7)) == slice(5, 60)
    assert "neither the grid of 6x8, prefix 5, suffix 7 nor end with it" in query_rows(40, Layout((6, 8), 5, 7))


def test_kandinsky_block_mask_is_respected():
    model, inputs = tiny_models.kandinsky5()
    family = visattn.pipelines.families.find_family(model)
    seen = family.seen(model.config, {**inputs, "sparse_params": {"to_fractal": True}})
    assert not seen.grid and "fractal order" in seen.why


def test_sana_has_nothing_to_make_sparse():
    with pytest.raises(ValueError, match="SanaTransformer2DModel: its self-attention is linear already"):
        visattn.apply(tiny_models.sana(), "na(window=3x3)")


def test_ltx_without_sizes_falls_back():
    model, inputs = tiny_models.ltx()
    family = visattn.pipelines.families.find_family(model)
    assert "num_frames, height and width" in family.seen(model.config, {**inputs, "height": None}).why


@pytest.mark.parametrize("name", ["flux", "sd15", "wan", "hunyuan_video"])
def test_reference_backend_gives_the_same(name):
    build, _, pattern = tiny_models.FAMILIES[name]
    model, inputs = build()
    with visattn.apply(model, pattern):
        auto = tiny_models.run(model, inputs)
    with visattn.apply(model, pattern, backend="reference") as handle:
        torch.testing.assert_close(tiny_models.run(model, inputs), auto, rtol=1e-4, atol=1e-5)
        assert {call.backend for site in handle.report().sites for call in site.calls} == {"reference"}
