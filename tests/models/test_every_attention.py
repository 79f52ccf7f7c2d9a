"""Every class of the installed timm that attends has a record, is inside of a block that has one, or has a reason."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch import nn

import visattn
from scripts.timm_models import PAGE, RESULT, known, names, render
from visattn.models.swap.records import RECORDS
from visattn.models.swap.refused import REFUSED

FOLDER = Path(timm.__file__).parent
# Inside of blocks that have a record.
INSIDE = {
    "davit.WindowAttention": "davit.SpatialBlock",
    "efficientvit_msra.CascadedGroupAttention": "efficientvit_msra.LocalWindowAttention",
    "gcvit.WindowAttentionGlobal": "gcvit.GlobalContextVitBlock",
    "hieradet_sam2.MultiScaleAttention": "hieradet_sam2.MultiScaleBlock",
    "maxxvit.Attention2d": "maxxvit.TransformerBlock2d",
    "maxxvit.AttentionCl": "maxxvit.PartitionAttentionCl",
    "swin_transformer.WindowAttention": "swin_transformer.SwinTransformerBlock",
    "swin_transformer_v2.WindowAttention": "swin_transformer_v2.SwinTransformerV2Block",
    "swin_transformer_v2_cr.WindowMultiHeadAttention": "swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "tiny_vit.Attention": "tiny_vit.TinyVitBlock",
    "vision_transformer_sam.Attention": "vision_transformer_sam.Block",
}
# Around attention of other classes, or unused.
AROUND = {
    "timm.layers.attention2d.Attention2d",
    "timm.models._efficientnet_blocks.MobileAttention",
    "timm.models.byobnet.SelfAttnBlock",
    "timm.models.cait.LayerScaleBlockClassAttn",
    "timm.models.crossvit.CrossAttentionBlock",
    "timm.models.fastvit.AttentionBlock",
}


def attending():
    """Classes of timm whose text has a softmax or torch's attention, or whose name says that they attend."""
    found = set()
    for room in ("models", "layers"):
        for path in (FOLDER / room).glob("*.py"):
            for part in re.split(r"^(?=class |def |@)", path.read_text(), flags=re.M):
                name = re.match(r"class (\w+)\(", part)
                if name and re.search(r"softmax\(|scaled_dot_product_attention|class \w*(Attention|Attn)\w*\(", part):
                    found.add(f"timm.{room}.{path.stem}.{name[1]}")
    return found


def test_every_class_that_attends_is_answered():
    inside = {f"timm.models.{name}" for name in INSIDE}
    assert {f"timm.models.{name}" for name in INSIDE.values()} <= set(RECORDS)
    unknown = attending() - set(RECORDS) - set(REFUSED) - inside - AROUND
    assert not unknown, f"timm {timm.__version__}: swap {sorted(unknown)}, or say in models/swap/refused.py why not"


def test_no_answer_is_of_a_class_that_the_installed_release_lacks():
    for name in {*REFUSED, *RECORDS} - {"timm.models.vision_transformer.Attention"}:
        module, _, kind = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[kind]), kind), name
    assert not set(REFUSED) & set(RECORDS)


def test_the_page_counts_what_the_records_know():
    result = json.loads(RESULT.read_text())
    again = "run python -m scripts.timm_models --look"
    assert result["known"] == known(), again
    if result["timm"] == timm.__version__:
        assert sorted(result["models"]) == sorted(names()), again
    assert PAGE.read_text() == render(PAGE.read_text()), "run python -m scripts.timm_models"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cait_xxs24_224", r"TalkingHeadAttn: it mixes the weights of its heads before and after the softmax"),
        ("xcit_nano_12_p16_224", r"XCA: it attends between channels, not tokens: its cost is linear"),
        ("efficientformerv2_s0", r"Attention2d: it mixes the weights of its heads"),
        ("coat_tiny", r"FactorAttnConvRelPosEnc: it is linear in the tokens already"),
        ("efficientvit_b0", r"LiteMLA: it is linear in the tokens already"),
        ("resnet18", r"none of its modules is one; `visattn models` lists those of timm"),
    ],
)
def test_models_that_are_refused_say_why(name, why):
    model = timm.create_model(name, device="meta")
    with pytest.raises(ValueError, match=why):
        visattn.apply(model, "na(window=3)")


def test_attention_that_stays_among_swapped_ones_says_why():
    torch.manual_seed(0)
    model = timm.create_model("convit_tiny", depth=3, local_up_to_layer=2, embed_dim=8, num_heads=2).eval()
    assert isinstance(model, nn.Module)
    with visattn.apply(model, "na(window=3)") as handle, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
        report = handle.report()
    assert report.sites_hit == 1
    assert report.fallbacks == {"it mixes its softmax with one of positions, by a gate": 2}


def test_attention_that_stays_counts_as_dense_where_that_was_asked_for():
    model = timm.create_model("convit_tiny", depth=3, local_up_to_layer=1, embed_dim=8, num_heads=2).eval()
    assert isinstance(model, nn.Module)
    with visattn.apply(model, "na(window=3)", dense_layers=1) as handle, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
        report = handle.report()
    assert [(site.hits, site.dense, site.fallbacks) for site in report.sites] == [(0, 1, {}), (1, 0, {}), (1, 0, {})]
    assert "not called" not in str(report)
