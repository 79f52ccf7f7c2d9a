"""Blocks of windows that are the whole map: a small window is stock attention under its mask."""

import pytest

pytest.importorskip("timm")

import timm
import torch

import visattn
from tests.models.test_swap import TOKENS
from tests.models.test_swap_families import Masked, swappable
from tests.models.test_swap_maps import randomise
from tests.support.tiny_timm import FAMILIES, SHOWN
from visattn.models.swap.records import RECORDS, name_of_record
from visattn.patterns import Neighborhood

SMALL = {"img_size": 96, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32), "stem_width": 16}
ONE = {"img_size": 32, "depths": (1,), "embed_dim": 32, "num_heads": (2,)}
SAM = {"depth": 1, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": ()}
# By record: a model, its arguments, and the side of the maps of the blocks that are looked at.
MODELS = {
    "swin_transformer.SwinTransformerBlock": ("swin_tiny_patch4_window7_224", {**ONE, "window_size": 8}, 8),
    "swin_transformer_v2.SwinTransformerV2Block": ("swinv2_tiny_window8_256", ONE, 8),
    "maxxvit.PartitionAttentionCl": ("maxvit_rmlp_pico_rw_256", SMALL, 3),
    "maxxvit.PartitionAttention2d": (
        "maxvit_rmlp_pico_rw_256",
        {**SMALL, "transformer_use_nchw_attn": True},
        3,
    ),
    "maxxvit.ParallelPartitionAttention": ("maxvit_tiny_pm_256", SMALL, 3),
    "maxxvit.TransformerBlock2d": ("coatnet_rmlp_nano_rw_224", SMALL, 3),
    "davit.SpatialBlock": (
        "davit_tiny",
        {"depths": (1,), "embed_dims": (32,), "num_heads": (2,), "window_size": 4},
        4,
    ),
    "vision_transformer_sam.Block": ("samvit_base_patch16", {**SAM, "img_size": 48, "window_size": 3}, 3),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_small_window_equals_stock_under_its_mask(name, monkeypatch):
    kind, arguments, side = MODELS[name]
    model = randomise(timm.create_model(kind, num_classes=10, **arguments).eval())
    x = torch.randn(2, 3, *[arguments.get("img_size", 16)] * 2)
    stock = model(x)
    with visattn.apply(model, "na(window=2)") as handle:
        model(x)
        layouts = {site.site: site.calls[0].problem.layout for site in handle.report().sites if site.calls}
    modules = {path: module for path, module in swappable(model).items() if layouts[path].grid == (side, side)}
    assert {name_of_record(module) for module in modules.values()} == {f"timm.models.{name}"}
    with visattn.apply(model, dict.fromkeys(modules, "na(window=2)"), strict=True):
        found = model(x)
    # The other half of a parallel block attends to a grid of tokens as before.
    inside = {path: getattr(module, "attn_block", module) for path, module in modules.items()}
    Masked(monkeypatch, inside, {path: visattn.dense_mask(Neighborhood(2), layouts[path]) for path in modules})
    wanted = model(x)
    assert (wanted - stock).abs().max() > 1e-4 * stock.std()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


def test_every_record_is_shown_on_a_model():
    # timm's models of today have the class of its layers instead.
    older = "timm.models.vision_transformer.Attention"
    shown = {f"timm.{name}" for name in SHOWN} | {f"timm.models.{name}" for name in MODELS}
    assert shown == set(RECORDS) - {older}
    assert set(SHOWN.values()) <= {*TOKENS, *FAMILIES}
