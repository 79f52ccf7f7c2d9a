"""Swapped models in graphs of torch.fx, and attention maps by hook."""

import copy
import pickle

import pytest

pytest.importorskip("timm")

import timm
import torch
from timm.models import FeatureGraphNet
from timm.models import create_feature_extractor as timm_extractor
from timm.utils import AttentionExtract

import visattn
from tests.support.oracles import mask_of, neighborhood
from visattn.layout import Layout
from visattn.models.swap.hooks import Follow
from visattn.models.swap.places import Places
from visattn.models.swap.sources import Source, last_map

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {
    "vit_tiny_patch16_224": ("blocks.1", {"img_size": 64, "depth": 2}),
    "beit_base_patch16_224": ("blocks.1", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "eva02_tiny_patch14_224": ("blocks.1", {"img_size": 56, "depth": 2}),
    "swin_tiny_patch4_window7_224": (
        "layers.1",
        {"img_size": 64, "window_size": 4, "depths": (1, 2), "embed_dim": 24, "num_heads": (1, 2)},
    ),
    "davit_tiny": ("stages.1", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (1, 2)}),
}


def torchvision_extractor(model, nodes):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(model, nodes)


def made(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **MODELS[name][1]).eval()


def seen(model, node, x):
    found = {}
    handle = model.get_submodule(node).register_forward_hook(lambda module, args, out: found.update(out=out))
    model(x)
    handle.remove()
    return found["out"]


@pytest.mark.parametrize(
    ("name", "extractor"),
    [("vit_tiny_patch16_224", torchvision_extractor), *((name, timm_extractor) for name in MODELS)],
)
def test_extracted_features_are_those_of_the_swapped_model(name, extractor):
    node, options = MODELS[name]
    model, x = made(name), torch.randn(2, 3, options.get("img_size", 64), options.get("img_size", 64))
    stock = seen(model, node, x)
    with visattn.apply(model, "na(window=3x3)", backend="tiles", strict=True) as handle:
        true = seen(model, node, x)
        graph = extractor(model, [node])
        before = handle.report().hits
        assert torch.equal(graph(x)[node], true) and (true - stock).abs().max() > 1e-4
        assert handle.report().hits > before
        for other in (copy.deepcopy(graph).eval(), pickle.loads(pickle.dumps(graph))):
            assert torch.allclose(other(x)[node], stock, atol=1e-6), "copies are stock"
    assert torch.allclose(graph(x)[node], stock, atol=1e-6)


def test_a_graph_follows_the_size_of_its_images():
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 2, "dynamic_img_size": True, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    with visattn.apply(model, "na(window=3x3)", backend="tiles"):
        graph = timm_extractor(model, ["blocks.1"])
        images = [torch.randn(1, 3, *size) for size in ((64, 96), (96, 64))]
        outs = [graph(x)["blocks.1"] for x in images]
        for x, out in zip(images, outs, strict=True):
            assert torch.equal(out, seen(model, "blocks.1", x))
        sum(out.square().sum() for out in outs).backward()
        found = model.blocks[0].attn.qkv.weight.grad.clone()
        model.zero_grad()
        sum(seen(model, "blocks.1", x).square().sum() for x in images).backward()
        assert torch.allclose(found, model.blocks[0].attn.qkv.weight.grad, rtol=1e-4, atol=1e-4)


def test_symbolic_trace_runs_the_embedding_once():
    model, x = made("vit_tiny_patch16_224"), torch.randn(1, 3, 64, 64)
    with visattn.apply(model, "na(window=3x3)", backend="tiles"):
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(x), model(x))
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("patch_embed") == 1 and targets.count("blocks.0.attn") == 1
        assert "patch_embed.proj" not in targets


def test_names_inside_the_embedding_stay_for_extractors():
    model, x = made("vit_tiny_patch16_224"), torch.randn(1, 3, 64, 64)
    with visattn.apply(model, "na(window=3x3)"):
        out = timm_extractor(model, ["patch_embed.proj", "blocks.0"])(x)
        assert torch.equal(out["patch_embed.proj"], model.patch_embed.proj(x))
        assert torch.equal(out["blocks.0"], seen(model, "blocks.0", x))
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.softmax"):
            timm_extractor(model, ["blocks.0.attn.softmax"])


def test_features_by_graph_and_graphs_that_come_before_apply():
    model, x = made("vit_tiny_patch16_224"), torch.randn(1, 3, 64, 64)
    stock = FeatureGraphNet(model, (0, 1))
    with pytest.raises(ValueError, match=r"torch.fx has traced through its modules: apply\(\) to the model first"):
        visattn.apply(stock, "na(window=3x3)")
    with visattn.apply(model, "na(window=3x3)"):
        for out, node in zip(FeatureGraphNet(model, (0, 1))(x), ("blocks.0", "blocks.1"), strict=True):
            assert torch.equal(out, seen(model, node, x))


def test_naflex_runs_in_graphs_on_the_grids_of_its_images():
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, depth=1).eval()
    with visattn.apply(model, "na(window=3x3)", backend="tiles"):
        graph = timm_extractor(model, ["blocks.0"])
        for size in ((64, 96), (96, 64)):
            x = torch.randn(1, 3, *size)
            assert torch.equal(graph(x)["blocks.0"], seen(model, "blocks.0", x))


def test_attention_maps_by_hook_are_the_weights_of_the_pattern():
    model, x = made("vit_tiny_patch16_224"), torch.randn(2, 3, 64, 64)
    for block in model.blocks:
        block.attn.fused_attn = False
    with visattn.apply(model, "na(window=3x3)"):
        maps = list(AttentionExtract(model, method="hook")(x).values())
    layout = Layout((4, 4), prefix=1)
    shown = mask_of(lambda q, k: all(neighborhood(i, j, 4, 3, 1, 1, False) for i, j in zip(q, k, strict=True)), layout)
    assert len(maps) == 2
    for each in maps:
        assert each.shape == (2, 3, 17, 17) and (each.sum(-1) - 1).abs().max() < 1e-5
        assert torch.equal(each > 0, shown.expand_as(each))


def test_attention_maps_that_do_not_exist_are_said_to():
    model, x = made("beit_base_patch16_224"), torch.randn(1, 3, 64, 64)
    for block in model.blocks:
        block.attn.fused_attn = False
    with (
        visattn.apply(model, "na(window=3x3)"),
        pytest.warns(UserWarning, match=r"blocks\.0\.attn.* no attention maps"),
    ):
        AttentionExtract(model, method="hook")(x)


def test_an_embedding_of_several_outputs_is_refused():
    class Embed(torch.nn.Module):
        def forward(self, x):
            return x, x.mean()

    embed = Embed()
    embed.register_forward_hook(Follow(Places("model", None, 0), Source(embed, last_map, 0)), with_kwargs=True)
    with pytest.raises(ValueError, match=r"Embed gives several outputs.*forward_intermediates\(\)"):
        torch.fx.symbolic_trace(torch.nn.Sequential(embed))
