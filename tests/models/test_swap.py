"""`visattn.apply` on timm models."""

import copy

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch.nn import functional

import visattn
import visattn.models
from tests.support.tiny_timm import randomise, records_shown
from visattn import Layout
from visattn.models.swap.records import name_of_record
from visattn.models.swap.runtime import is_swapped
from visattn.offsets import offsets_of
from visattn.patterns import Neighborhood

NARROW = {"embed_dim": 96, "num_heads": 3}
# Two blocks each, on a grid of 6 x 6 patches or near it.
TOKENS = {
    "vit_tiny_patch16_224": {"img_size": 96},
    "deit_tiny_distilled_patch16_224": {"img_size": 96},
    "deit3_small_patch16_224": {"img_size": 96},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98},
    "vit_base_patch32_clip_224": {"img_size": 192, **NARROW},
    "vit_base_patch16_siglip_224": {"img_size": 96, **NARROW},
    "vit_tiny_r_s16_p8_224": {"img_size": 192},
    "vitamin_small_224": {"img_size": 96},
    "aimv2_large_patch14_224": {"img_size": 84, **NARROW},
    "eva02_tiny_patch14_224": {"img_size": 98},
    "eva_large_patch14_196": {"img_size": 98, **NARROW},
    "vit_small_patch16_dinov3": {"img_size": 96},
    "vit_small_patch16_rope_224": {"img_size": 96},
    "vit_base_patch16_rope_mixed_224": {"img_size": 96, **NARROW},
    "vit_pe_core_tiny_patch16_384": {"img_size": 96},
    "beit_base_patch16_224": {"img_size": 96, **NARROW},
    "beitv2_base_patch16_224": {"img_size": 96, **NARROW},
    "naflexvit_base_patch16_gap": {},
    "vit_relpos_small_patch16_224": {"img_size": 96},
    "vit_relpos_base_patch16_cls_224": {"img_size": 96, **NARROW},
    "vit_relpos_base_patch16_clsgap_224": {"img_size": 96, **NARROW, "rel_pos_type": "bias"},
}
SWINS = {
    "swin_tiny_patch4_window7_224": {"img_size": 112, "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"img_size": 128, "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
}


def make(name, **kwargs):
    """A shallow model with weights at which attention matters."""
    model = timm.create_model(name, num_classes=10, **{"depth": 2, **TOKENS.get(name, {}), **kwargs}).eval()
    return randomise(model)


def make_swin(name, depths=(1, 1, 1, 1)):
    return randomise(timm.create_model(name, num_classes=10, depths=depths, **SWINS[name]).eval())


def image(name, batch=2):
    side = TOKENS[name].get("img_size", 96)
    return torch.randn(batch, 3, side, side)


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_full_window_equals_stock_and_undo_is_exact(name):
    model, x = make(name), image(name)
    stock, keys, kinds = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    with visattn.apply(model, "na(window=99)") as handle:
        assert torch.equal(model(x), stock)
        assert handle.report().sites[0].calls[0].backend == "stock"
        assert list(model.state_dict()) == keys
    with visattn.apply(model, "na(window=99)", backend="reference") as handle:
        assert (model(x) - stock).abs().max() <= 1e-4 * stock.std()
        assert handle.report().sites_hit == 2
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), stock)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_window_equals_stock_under_its_mask(name, monkeypatch):
    model, x = make(name), image(name)
    with visattn.apply(model, "na(window=3)") as handle:
        assert records_shown(name) <= {name_of_record(m) for m in model.modules() if is_swapped(m)}
        found = model(x)
        layout = handle.report().sites[0].calls[0].problem.layout
        if "beit" in name or "cls" in name:  # their class token is apart
            layout = Layout(layout.grid, prefix=1)
    mask = visattn.dense_mask(Neighborhood(3), layout)
    attend = functional.scaled_dot_product_attention

    def masked(q, k, v, attn_mask=None, **kwargs):
        if q.shape[2] == k.shape[2] == len(mask):
            hidden = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            attn_mask = hidden if attn_mask is None else attn_mask + hidden
        return attend(q, k, v, attn_mask=attn_mask, **kwargs)

    stock = model(x)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", masked)
    wanted = model(x)
    assert (wanted - stock).abs().max() > 1e-3 * stock.std()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize("name", SWINS)
@torch.no_grad()
def test_swin_as_blocked_neighborhood_equals_stock(name):
    model = make_swin(name)
    window = model.layers[0].blocks[0].window_size[0]
    x = torch.randn(2, 3, *[SWINS[name]["img_size"]] * 2)
    stock = model(x)
    with visattn.apply(model, f"na(window={window}, stride={window})", layers=slice(0, 2)) as handle:
        assert (model(x) - stock).abs().max() <= 1e-4 * stock.std()
        assert handle.report().sites_hit == 2
    with visattn.apply(model, "na(window=3)"):
        assert (model(x) - stock).abs().max() > 1e-3 * stock.std()
    assert torch.equal(model(x), stock)


@pytest.mark.parametrize("name", SWINS)
def test_swin_trains_swapped(name):
    model = make_swin(name).train()
    visattn.apply(model, "na(window=5)")
    model(torch.randn(1, 3, *[SWINS[name]["img_size"]] * 2)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_bias_table_becomes_rpb():
    table = torch.arange(9.0)[:, None]  # window 2: query minus key from -1 to 1 per axis
    rpb = offsets_of(table, (2, 2), Neighborhood(2), (4, 4))
    assert rpb[0].tolist() == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]
    assert offsets_of(table, (2, 2), Neighborhood(1), (4, 4))[0].tolist() == [[4]]
    wide = offsets_of(table, (2, 2), Neighborhood(3), (4, 4))[0]
    assert wide.shape == (5, 5) and wide[0, 0] == wide[1, 1] == 8


@torch.no_grad()
def test_image_size_per_call():
    model = make("vit_tiny_patch16_224", img_size=96, dynamic_img_size=True)
    handle = visattn.apply(model, "na(window=3)")
    for height, width in ((96, 128), (128, 96), (64, 160)):
        model(torch.randn(1, 3, height, width))
    grids = [call.problem.layout.grid for call in handle.report().sites[0].calls]
    assert sorted(grids) == [(4, 10), (6, 8), (8, 6)]


ONE_OF_A_KIND = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_relpos_base_patch16_clsgap_224", *SWINS)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
@torch.no_grad()
def test_copies_features_and_compiled_models(name):
    model = make_swin(name) if name in SWINS else make(name)
    x = torch.randn(2, 3, *[SWINS[name]["img_size"]] * 2) if name in SWINS else image(name)
    torch._dynamo.reset()
    handle = visattn.apply(model, "na(window=3)")
    swapped, copied = model(x), copy.deepcopy(model)
    features, maps = model.forward_intermediates(x)
    assert torch.equal(model.forward_head(features), swapped) and len(maps) >= 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), swapped, rtol=1e-5, atol=1e-6)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), swapped, rtol=1e-5, atol=1e-6)
    handle.remove()
    assert not torch.equal(model(x), swapped)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("size", [96, 384])
@torch.no_grad()
def test_traces(size):
    # A small grid goes to SDPA, a large one to the tile engine.
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=size).eval()
    x = torch.randn(1, 3, size, size)
    with visattn.apply(model, "na(window=5x5)"):
        swapped = model(x)
        # The first call after a start makes masks and lists, which later ones keep: the recorded graphs differ.
        # Written down in plain operators: on the large grid those are not the tile engine's.
        traced = torch.jit.trace(model, x, check_trace=False)(x)
        torch.testing.assert_close(traced, swapped, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_only():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=96, features_only=True).eval()
    x = torch.randn(1, 3, 96, 96)
    randomise(model)
    stock = model(x)
    with visattn.apply(model, "na(window=3)") as handle:
        assert any(not torch.equal(a, b) for a, b in zip(model(x), stock, strict=True))
        assert handle.report().sites_hit == 4
    assert all(torch.equal(a, b) for a, b in zip(model(x), stock, strict=True))


def test_gradients_and_checkpointing():
    model, x = make("vit_tiny_patch16_224").train(), image("vit_tiny_patch16_224")
    visattn.apply(model, "na(window=3)")
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_layers_and_fallbacks_are_counted():
    model, x = make("vit_tiny_patch16_224", attn_drop_rate=0.5), image("vit_tiny_patch16_224")
    with visattn.apply(model, {"0": "dense", "1": "na(window=3)"}, strict=True) as handle:
        model(x)
        first, second = handle.report().sites
        assert (first.dense, first.hits, second.dense, second.hits) == (1, 0, 0, 1)
        with pytest.raises(ValueError, match=r"did not run their pattern .attention dropout 0.5 is on in training"):
            model.train()(x)
        assert handle.report().fallbacks == {"attention dropout 0.5 is on in training": 1}
        model.eval()
        mask = torch.ones(37, 37, dtype=torch.bool)
        model.blocks[1].attn(torch.randn(2, 37, 192), attn_mask=mask)
        model.blocks[1].attn(torch.randn(2, 37, 192), is_causal=True)
        reasons = handle.report().fallbacks
        assert "attn_mask is torch.bool [37, 37], not a bool mask of keys [B, 1, 1, S]" in reasons
        assert "is_causal is set" in reasons


@torch.no_grad()
def test_key_masks_reach_the_pattern():
    model = make("vit_tiny_patch16_224")
    attn, x = model.blocks[0].attn, torch.randn(2, 37, 192)
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    mask[..., 30:] = False
    wanted = attn(x, attn_mask=mask)
    with visattn.apply(model, "na(window=99)", layout=Layout((6, 6), prefix=1)) as handle:
        assert torch.allclose(attn(x, attn_mask=mask), wanted, rtol=1e-4, atol=1e-5)
        assert handle.report().fallbacks == {}


def flexible(grids, length):
    """A NaFlexViT batch of one sample per grid, padded to a length."""
    batch = {
        "patches": torch.zeros(len(grids), length, 768),
        "patch_coord": torch.zeros(len(grids), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), length, dtype=torch.bool),
    }
    for i, (rows, columns) in enumerate(grids):
        n = rows * columns
        batch["patches"][i, :n] = torch.randn(n, 768)
        batch["patch_coord"][i, :n] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][i, :n] = True
    return batch


GROUPED = {"rope_type": "axial", "attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("naflexvit_base_patch16_gap", {}),
        ("naflexvit_so150m2_patch16_reg1_map", {}),
        ("naflexvit_base_patch16_gap", GROUPED),
    ],
)
@torch.no_grad()
def test_every_sample_of_a_naflex_batch_has_its_own_grid(name, options):
    model = make(name, **{"embed_dim": 96, "num_heads": 3, **options})
    grids = [(4, 5), (5, 4), (2, 3), (4, 5)]
    batch = flexible(grids, 24)
    stock = model(batch)
    with visattn.apply(model, "na(window=99)", backend="reference"):
        assert (model(batch) - stock).abs().max() <= 1e-4 * stock.std()
    handle = visattn.apply(model, "na(window=3)")
    found = model(batch)
    assert (found - stock).abs().max() > 1e-3 * stock.std()
    report = handle.report()
    assert {call.problem.layout.grid for call in report.sites[0].calls} == set(grids) and not report.fallbacks
    for i, (rows, columns) in enumerate(grids):  # neither padding nor neighbours in the batch change a sample
        alone = {key: value[i : i + 1, : rows * columns] for key, value in batch.items()}
        assert (model(alone) - found[i]).abs().max() <= 1e-4 * found.std()


@torch.no_grad()
def test_naflex_batches_that_are_no_grids_run_stock():
    model = make("naflexvit_base_patch16_gap", embed_dim=96, num_heads=3)
    handle = visattn.apply(model, "na(window=3)")
    batch = flexible([(4, 5), (4, 5)], 20)
    model(batch)
    assert handle.report().sites[0].calls[0].problem.layout.grid == (4, 5)
    later = torch.ones(24, 24).triu(1).bool()  # 4 registers come first
    own = torch.zeros(2, 1, 24, 24).masked_fill(later, torch.finfo(torch.float32).min)
    model.forward_features(**batch, attn_mask=own)
    assert handle.report().fallbacks == {"attn_mask hides more than padding": 2}
    batch["patch_coord"][1] = batch["patch_coord"][1].flip(0)
    model(batch)
    assert handle.report().fallbacks["the patches of a sample are no whole grid, row by row"] == 2


def test_naflex_batches_train():
    model = make("naflexvit_base_patch16_gap", embed_dim=96, num_heads=3).train()
    visattn.apply(model, "na(window=3)")
    model(flexible([(4, 5), (2, 3)], 20)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_refusals():
    model, x = make("vit_tiny_patch16_224", patch_drop_rate=0.5), image("vit_tiny_patch16_224")
    with visattn.apply(model, "na(window=3)"):
        model(x)
        with pytest.raises(ValueError, match=r"patch_drop_rate=0.5 drops patches in training"):
            model.train()(x)
        with pytest.raises(ValueError, match="VisionTransformer is patched already"):
            visattn.apply(model, "na(window=3)")
    for name in ("naflexvit_base_patch16_gap", "samvit_base_patch16", "eva02_tiny_patch14_224"):
        other = timm.create_model(name, depth=1, patch_drop_rate=0.5, **TOKENS.get(name, {"img_size": 96}))
        visattn.apply(other, "na(window=3)")
        with pytest.raises(ValueError, match=r"patch_drop_rate=0.5 drops patches in training"):
            other.train().forward_features(x if "eva" not in name else image(name))
    with pytest.raises(ValueError, match="dense_steps counts denoising steps"):
        visattn.apply(model, "na(window=3)", dense_steps=2)
    with pytest.raises(ValueError, match="3 axes"):
        visattn.apply(model, "na(window=3x3x3)")
    with pytest.raises(ValueError, match="ResNet has no attention module that visattn can swap"):
        visattn.apply(timm.create_model("resnet18", device="meta"), "na(window=3)")
    with pytest.raises(ValueError, match=r"cannot carry the relative position bias of SwinTransformer"):
        visattn.apply(make_swin("swin_tiny_patch4_window7_224"), "halo(block=4, halo=1)")
    with pytest.raises(ValueError, match=r"radial\(decay=0.2\) needs the frames of a video, and the tokens of Vision"):
        visattn.apply(model, "radial(decay=0.2)")
    with pytest.raises(ValueError, match=r"layers=\[\] names no layer"):
        visattn.apply(model, "na(window=3)", layers=[])
    with pytest.raises(ValueError, match=r"NAT has no attention .* this backbone has the attention of its paper"):
        visattn.apply(timm.create_model("nat_mini", device="meta"), "na(window=3)")
    assert not hasattr(model.blocks[0].attn, "visattn_site")


@torch.no_grad()
def test_models_whose_grid_nobody_tells_need_a_layout():
    model, x = make("vit_tiny_patch16_224"), image("vit_tiny_patch16_224")
    stem = torch.nn.Sequential(model.patch_embed)  # one that tells nothing
    model.patch_embed = stem
    with pytest.raises(ValueError, match=r"nothing in VisionTransformer tells where the tokens of blocks\.0\.attn sit"):
        visattn.apply(model, "na(window=3)")
    with visattn.apply(model, "na(window=3)", layout=Layout((6, 6), prefix=1)) as handle:
        model(x)
        assert handle.report().sites_hit == 2
    model, x = randomise(timm.create_model("pit_ti_224").eval()), torch.randn(1, 3, 224, 224)
    stock, layout = model(x), Layout((27, 27), prefix=1)
    with visattn.apply(model, "na(window=3)", layout=layout, layers="transformers.0.*") as handle:
        found = model(x)
        assert (found - stock).abs().max() > 1e-3 * stock.std() and handle.report().sites_hit == 2
    with visattn.apply(model, "na(window=3)", layers="transformers.0.*"):
        assert torch.equal(model(x), found)
    visattn.apply(model, "na(window=3)", layout=layout)
    with pytest.raises(ValueError, match=r"grid 27x27 has 730 tokens but q has 197"):
        model(x)


@torch.no_grad()
def test_a_shared_bias_runs_stock_and_is_counted():
    model = randomise(timm.create_model("vit_srelpos_small_patch16_224", img_size=96, depth=2).eval())
    x = torch.randn(1, 3, 96, 96)
    stock = model(x)
    with visattn.apply(model, "na(window=3)") as handle:
        assert torch.equal(model(x), stock)
        reason = "the position bias is shared by all blocks and comes as one dense tensor"
        assert handle.report().fallbacks == {reason: 2}


def test_strict_names_what_a_forward_missed():
    model, x = make("vit_tiny_patch16_224"), image("vit_tiny_patch16_224")
    visattn.apply(model, "na(window=3)", strict=True)
    model(x)
    model.blocks[1].forward = lambda x, **kwargs: x
    with pytest.raises(
        ValueError, match=r"strict: 1 of 2 selected attention .* VisionTransformer .*not called.*blocks\.1\.attn"
    ):
        model(x)


@torch.no_grad()
def test_a_wrong_layout_is_named():
    model = make("vit_tiny_patch16_224")
    visattn.apply(model, "na(window=3)", layout=Layout((5, 5), prefix=1))
    with pytest.raises(ValueError, match=r"prefix 1 \+ grid 5x5 has 26 tokens but q has 37"):
        model(image("vit_tiny_patch16_224"))
