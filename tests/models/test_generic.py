"""timm's own checks of its models (its tests/test_models.py), over the backbones at small size.

Every check there that is made for all models has its like here, in test_registered (full sizes) or in test_export; none
is skipped for any of these.
"""

import copy
import math

import pytest

pytest.importorskip("timm")

import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import get_notrace_functions, get_notrace_modules

_SWIN = {"embed_dim": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
SMALL = {
    "nat_small": {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "kernel_size": 3},
    "dinat_tiny": {
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "kernel_size": 3,
        "dilations": ((2,), (3,), (1, 2), (1,)),
    },
    "dinat_s_tiny": {**_SWIN, "depths": (1, 1, 2, 1), "kernel_size": 3, "dilations": ((2,), (3,), (1, 2), (1,))},
    "biformer_tiny": {"depth": (1, 1, 2, 1), "embed_dim": (16, 32, 48, 64), "head_dim": 8},
    "biformer_stl": {"depth": (1, 1, 2, 1), "embed_dim": (16, 32, 48, 64), "head_dim": 8},
    "agent_deit_base": {"embed_dim": 48, "num_heads": 3, "depth": 4, "agent_num": 9},
    "agent_swin_base": {**_SWIN, "depths": (1, 2, 3, 1)},
    "agent_pvt_tiny": {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 2, 1)},
    "mavit_base": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
        "projection": 80,
        "layer_init_values": (1.0, 1.0, 0.1, None),
    },
    "flowformer_small": {"embed_dim": (16, 32, 48, 64), "depth": (1, 1, 2, 1), "num_heads": 4},
    "fit_small": {
        "layers": "(1)1(1)1(1)",
        "patch_size": 16,
        "group": 2,
        "latents": 3,
        "embed_dim": 24,
        "latent_dim": 32,
        "num_heads": (3, 4),
    },
    "lrgt_base": {"embed_dim": 48, "num_heads": 3, "depth": 4, "lga_layer": (1, 3), "patch_group": 3},
    "moh_vit_base_50": {
        "embed_dims": (16, 32, 64, 64),
        "num_heads": (4, 8, 16, 16),
        "depths": (1, 1, 1, 1),
        "shared_head": (2, 0, 1, 4),
    },
    "moh_vit_small_80": {"embed_dims": (12, 24, 48, 48), "num_heads": (3, 6, 12, 24), "depths": (1, 1, 1, 1)},
}
SIDE = 64


def make(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], **kwargs}).eval()


# Others of the same paper and code are tested in full.
LIKE_OTHERS = ("dinat_tiny", "biformer_stl", "moh_vit_base_50")


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS)) for n in SMALL])
def name(request):
    return request.param


def test_forward_and_checkpointing(name):
    model, x = make(name), torch.randn(1, 3, SIDE, 96)
    out = model(x)
    assert out.shape == (1, 1000) and out.isfinite().all()
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), out, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient(name):
    model = make(name, num_classes=42).train()
    out = model(torch.randn(2, 3, SIDE, SIDE))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_unpooled_features_and_heads(name):
    model, x = make(name, device="meta"), torch.randn(1, 3, 224, 224, device="meta")
    features = model.forward_features(x)
    pre = model.forward_head(features, pre_logits=True)
    assert features.shape[get_channel_dim(model.output_fmt)] == model.num_features
    assert pre.shape == (1, model.head_hidden_size)
    if model.default_cfg["pool_size"]:
        assert tuple(features.shape[a] for a in get_spatial_dim(model.output_fmt)) == model.default_cfg["pool_size"]
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == pre.shape
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert make(name, device="meta", num_classes=0)(x).shape == pre.shape
    assert make(name, device="meta", num_classes=0, global_pool="")(x).shape == features.shape
    model = model.to(torch.float64)
    model.reset_classifier(2)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())
    frozen = make(name, device="meta").requires_grad_(False)
    frozen.reset_classifier(0)
    frozen.reset_classifier(0, "")
    assert not any(p.requires_grad for p in frozen.parameters())


def test_change_of_dtype(name):
    model = make(name).to(torch.bfloat16)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_features_only(name):
    model = make(name, features_only=True)
    outputs = model(torch.randn(1, 3, SIDE, SIDE))
    info = model.feature_info
    assert len(outputs) == len(info.channels()) >= 3
    for out, channels, reduction in zip(outputs, info.channels(), info.reduction(), strict=True):
        assert out.shape[1] == channels
        assert SIDE / (2 * reduction) < out.shape[2] <= math.ceil(SIDE / reduction) + 1


def test_forward_intermediates(name):
    model, x = make(name), torch.randn(1, 3, SIDE, 96)
    out, maps = model.forward_intermediates(x)
    torch.testing.assert_close(out, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [i["num_chs"] for i in model.feature_info]
    for i, whole in enumerate(maps):
        (early,) = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, whole)
    other = "NLC" if model.output_fmt == "NLC" else "NHWC"
    (last,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt=other, intermediates_only=True)
    if other == "NHWC":
        torch.testing.assert_close(last if model.output_fmt == "NHWC" else last.permute(0, 3, 1, 2), out)
    else:
        torch.testing.assert_close(last, out[:, model.num_prefix_tokens :])
    with pytest.raises(ValueError, match="output_fmt 'CHWN' must be"):
        model.forward_intermediates(x, output_fmt="CHWN")
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], out, rtol=1e-4, atol=1e-5)


def test_pruning(name):
    model, x = make(name), torch.randn(1, 3, SIDE, SIDE)
    maps = model.forward_intermediates(x, intermediates_only=True)
    last = len(maps) - 1
    same = copy.deepcopy(model)
    same.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(same(x), model(x))
    for i in {0, 2, last}:
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([i], prune_norm=True)
        (found,) = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        torch.testing.assert_close(found, maps[i])
        features = pruned.forward_features(x)
        if i < last and features.ndim == 4:
            nchw = features if model.output_fmt == "NCHW" else features.permute(0, 3, 1, 2)
            torch.testing.assert_close(nchw, maps[i])
        pruned.train()(x).sum().backward()
        assert [n for n, p in pruned.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore")
def test_torchscript(name):
    with timm.layers.set_scriptable(True):
        model = make(name)
    x = torch.randn(1, 3, SIDE, SIDE)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


def trace(model):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    kwargs = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train, evaluation = extraction.get_graph_node_names(model, tracer_kwargs=kwargs)
    return extraction.create_feature_extractor(
        model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:], tracer_kwargs=kwargs
    )


@pytest.mark.filterwarnings("ignore")
def test_fx(name):
    model, x = make(name, num_classes=42), torch.randn(2, 3, SIDE, SIDE)
    # Its graphs of evaluation and of training share their weights.
    traced = trace(model)
    with torch.inference_mode():
        (out,) = traced(x).values()
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    (out,) = traced.train()(x).values()
    out.mean().backward()
    assert out.shape == (2, 42)
    assert [n for n, p in traced.named_parameters() if p.grad is None] == []


@pytest.mark.filterwarnings("ignore")
def test_fx_torchscript(name):
    with timm.layers.set_scriptable(True):
        model = make(name)
    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        (out,) = torch.jit.script(trace(model))(x).values()
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compiled(name):
    model, x = make(name), torch.randn(1, 3, SIDE, SIDE)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(x)
        # Whether the operators can be traced without data is what exports show: test_export.
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)


def test_pretrained_weights_for_other_images_and_classes(name, tmp_path):
    # timm downloads here; a file takes the same way.
    torch.save(make(name).state_dict(), tmp_path / "file.pth")
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "file.pth")}}
    for classes in (5, 0):
        model = make(name, in_chans=1, num_classes=classes, **source)
        assert model(torch.randn(1, 1, SIDE, SIDE)).shape == (1, classes or model.head_hidden_size)
    features = make(name, features_only=True, **source)
    x = torch.randn(1, 3, SIDE, SIDE)
    for found, wanted in zip(features(x), make(name, features_only=True)(x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_pools_and_positions_that_do_not_exist():
    with pytest.raises(ValueError, match="global_pool 'mean' must be 'token', 'avg' or ''"):
        make("agent_deit_base", global_pool="mean")
    with pytest.raises(ValueError, match="agent_num 10 must be a square"):
        make("agent_deit_base", agent_num=10)
    with pytest.raises(ValueError, match="attn_type 'AAX' must have a letter A, B or M"):
        make("agent_swin_base", attn_type="AAX")
    with pytest.raises(ValueError, match="topk 0 must be at least 1, or -2"):
        make("biformer_tiny", topks=(0, 4, 16, -2))
    with pytest.raises(ValueError, match=r"flags \('l', 'x'\) must have 'l' \(linear\) or 'v' \(softmax\)"):
        make("mavit_base", flags=("l", "x"))
    with pytest.raises(ValueError, match=r"layers '\(2\)4' must be numbers of local layers"):
        make("fit_small", layers="(2)4")
    with pytest.raises(ValueError, match="img_size 224 must be a multiple of a group's 48 pixels"):
        make("fit_small", group=3)
    with pytest.raises(ValueError, match="5 x 4 tokens has no whole groups of 2 x 2"):
        make("fit_small")(torch.randn(1, 3, 80, 64))
    with pytest.raises(ValueError, match="patch_group=0 must be at least 1"):
        make("lrgt_base", patch_group=0)
    with pytest.raises(ValueError, match="embed_dim 48 must be a multiple of the 5 heads"):
        make("lrgt_base", num_heads=5)
    with pytest.raises(ValueError, match="embed_dim 16 must be a multiple of the 12 heads"):
        make("flowformer_small", num_heads=12)
    with pytest.raises(ValueError, match="2 shared and 0 routed heads do not fit 4 heads"):
        make("moh_vit_base_50", routed_head=(0, 4, 6, 8))


def test_heads_and_dilations_that_do_not_fit():
    for name, arguments in (
        ("nat_small", {"num_heads": (3, 2, 4, 8)}),
        ("agent_pvt_tiny", {"num_heads": (3, 2, 5, 8)}),
        ("mavit_base", {"num_heads": (3, 2, 3, 4)}),
        ("moh_vit_small_80", {"num_heads": (5, 6, 12, 24), "shared_head": (5, 6, 3, 8)}),
    ):
        with pytest.raises(ValueError, match=r"embed_dim \d+ must be a multiple of the \d heads"):
            make(name, **arguments)
    with pytest.raises(ValueError, match="embed_dim 16 must be a multiple of head_dim 5"):
        make("biformer_tiny", head_dim=5)
    with pytest.raises(ValueError, match="heads of 2 channels have no rotary positions"):
        make("mavit_base", num_heads=(8, 2, 3, 4))
    with pytest.raises(ValueError, match=r"dilations .* must have a number for each block of the depths"):
        make("dinat_tiny", dilations=((2,), (3,), (1,), (1,)))


def test_load_balancing_loss():
    model = make("moh_vit_base_50")
    model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="run the model in training first"):
        model.load_balancing_loss()
    model.train()(torch.randn(1, 3, 64, 64))
    # Even use of the heads would give routed / routed heads of them, times their number: at least about 1 per layer.
    assert 0 < model.load_balancing_loss().item() < 100


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_swin_base", "agent_deit_base", "moh_vit_base_50"])
def test_biases_are_resampled_to_the_grid(name):
    model = make(name)
    with torch.no_grad():
        at_home = model(torch.randn(1, 3, 224, 224).sigmoid())
        away = model(torch.randn(1, 3, 160, 256).sigmoid())
    assert at_home.isfinite().all() and away.isfinite().all()


def test_official_files_are_unwrapped(tmp_path):
    model = make("nat_small")
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    loaded = make("nat_small", checkpoint_path=str(tmp_path / "file.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
