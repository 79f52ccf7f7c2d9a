"""Every model family: dense is stock to the bit, sparse reaches every module, undo restores by identity."""

import copy
import math
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import visattn
import visattn.pipelines.families
from tests.support import tiny_clips, tiny_edits, tiny_models, tiny_text_images, tiny_worlds
from tests.support.layouts import LAYOUTS, VARIANTS
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


# Masked in tests of their own, below; a clip of Latte with as many frames as a frame has tokens is masked with fewer.
OTHERWISE = {"omnigen", "anyflow_far", "sana_wm", "latte"}


def test_where_the_tokens_sit_is_known_of_every_tiny_model():
    assert {*LAYOUTS, *OTHERWISE} == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("kind", [*LAYOUTS, *VARIANTS])
def test_sparse_equals_masked_sdpa(kind, monkeypatch):
    """The whole model, stock, with the pattern's mask given to every call of SDPA that is visual self-attention."""
    build, layouts = VARIANTS[kind] if kind in VARIANTS else (tiny_models.FAMILIES[kind][0], LAYOUTS[kind])
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


@pytest.mark.parametrize("valid", [(1, 1, 1), (1, 1, 0)])
def test_softmax_layers_between_linear_ones(valid, monkeypatch):
    """Two branches of each attend in bfloat16, which is left out here; one hides frames by a mask that it adds."""
    model, inputs = tiny_worlds.sana_wm(valid)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    with visattn.apply(model, "na(window=3x3x3)", strict=True, backend="reference") as handle:
        sparse = tiny_models.run(model, inputs)
        paths = [site.site for site in handle.report().modules if site.hits]
    assert paths == [f"blocks.{i}.attn.{name}" for name in ("attn", "cam_attn") for i in (1, 3)]
    real, masked = torch.nn.functional.scaled_dot_product_attention, []

    def with_window(query, key, value, attn_mask=None, *args, **options):
        if key.shape[2] == 72:
            masked.append(attn_mask is not None)
            ours = window_mask((3, 6, 4), (3, 3, 3), 0, 0)
            attn_mask = ours if attn_mask is None else torch.where(ours, attn_mask, -torch.inf)
        return real(query, key, value, attn_mask, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_window)
    expected = tiny_models.run(model, inputs)
    assert masked == [False, not all(valid)] * 2
    torch.testing.assert_close(sparse, expected, rtol=2e-4, atol=2e-5)


def test_copies_of_modules_that_have_no_processor_are_stock():
    model, inputs = tiny_worlds.sana_wm()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "na(window=3x3x3)", strict=True):
        sparse = tiny_models.run(model, inputs)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(tiny_models.run(copied, inputs), stock)
        assert torch.equal(tiny_models.run(loaded, inputs), stock)
        with visattn.apply(copied, "na(window=3x3x3)", strict=True):
            assert torch.equal(tiny_models.run(copied, inputs), sparse)
        assert torch.equal(tiny_models.run(model, inputs), sparse)
        with pytest.raises(ValueError, match="patched already"):
            visattn.apply(model, "dense")
    assert not any(hasattr(module, "processor") for module in model.get_submodule("blocks.1.attn").modules())


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
