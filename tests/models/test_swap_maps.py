"""`visattn.apply` on timm's models that attend on maps: MaxViT, CoAtNet, DaViT, SAM."""

import copy

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch.nn import functional as F

import visattn
from tests.golden.fill import fill_value
from visattn import parse
from visattn.models.swap.bias import rpb_of
from visattn.patterns import Neighborhood
from visattn.positions import with_positions

# Arguments, side of the image, and side of the windows that stock attention cuts its maps into (0: none).
MAPS = {
    "test_maxvit": ({"img_size": 128}, 128, 4),
    "maxvit_tiny_pm_256": ({"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16}, 128, 4),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)}, 128, 4),
    "coatnet_rmlp_nano_rw_224": ({"img_size": 96, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 64)}, 96, 0),
    "test_coatnet": ({"img_size": 96}, 96, 0),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2), "window_size": 4}, 64, 4),
    "samvit_base_patch16": (
        {"img_size": 96, "depth": 2, "embed_dim": 32, "num_heads": 2, "window_size": 3, "global_attn_indexes": ()},
        96,
        3,
    ),
    "samvit_base_patch16_224": ({"img_size": 96, "depth": 2, "embed_dim": 32, "num_heads": 2, "window_size": 0}, 96, 0),
}


def make(name, **kwargs):
    """A small model with weights at which attention matters, and an image."""
    arguments, side, _ = MAPS[name]
    model = timm.create_model(name, **({"num_classes": 10} | arguments | kwargs)).eval()
    return randomise(model), torch.randn(2, 3, side, side)


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fill_value(name, parameter.shape))
    return model


def like_stock(name):
    window = MAPS[name][2]
    return f"na(window={window}, stride={window})" if window else "na(window=99)"


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_stock_windows_as_a_pattern_equal_stock_and_undo_is_exact(name):
    model, x = make(name)
    stock, keys, kinds = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    for backend in ("auto", "reference"):
        with visattn.apply(model, like_stock(name), backend=backend, strict=True) as handle:
            assert (model(x) - stock).abs().max() <= 1e-4 * stock.std()
            report = handle.report()
            assert report.sites_hit == len(report.sites) > 0 and report.fallbacks == {}
            assert list(model.state_dict()) == keys
    with visattn.apply(model, "na(window=2)"):
        assert (model(x) - stock).abs().max() > 1e-3 * stock.std()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), stock)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("test_maxvit", marks=pytest.mark.slow),
        pytest.param("test_coatnet", marks=pytest.mark.slow),
        "davit_tiny",
        "samvit_base_patch16",
    ],
)
@torch.no_grad()
def test_copies_compiled_and_exported_models(name):
    model, x = make(name)
    handle = visattn.apply(model, "na(window=3)")
    swapped, copied = model(x), copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), swapped, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), swapped, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert not torch.equal(model(x), swapped)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet", "davit_tiny", "samvit_base_patch16"])
@torch.no_grad()
def test_features_and_intermediates(name):
    model, x = make(name, features_only=True, out_indices=(-2, -1))
    stock = model(x)
    with visattn.apply(model, "na(window=2)"):
        found = model(x)
    assert [f.shape for f in found] == [f.shape for f in stock]
    assert not torch.equal(found[-1], stock[-1])
    model, x = make(name)
    visattn.apply(model, "na(window=2)")
    last, maps = model.forward_intermediates(x)
    assert torch.allclose(model.forward_head(last), model(x)) and len(maps) >= 2


@pytest.mark.parametrize("name", MAPS)
def test_every_parameter_gets_a_gradient(name):
    model, x = make(name)
    visattn.apply(model.train(), "na(window=3)")
    model(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "window"),
    [({"window_size": 0}, 6), ({"window_size": 3, "global_attn_indexes": ()}, 3)],
)
def test_gradients_equal_stock(arguments, window):
    model, x = make("samvit_base_patch16", **arguments)
    found = []
    for pattern in (None, f"na(window={window}, stride={window})"):
        model.zero_grad()
        if pattern:
            visattn.apply(model, pattern, backend="sdpa")
        model(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert (found[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    "pattern",
    [
        *("na(window=3)", "na(window=4x2)", "na(window=5, stride=3)", "na(window=2, dilation=2x3)", "dense"),
        *("na(window=3, causal=1x0)", "na(window=99)", "halo(block=3, halo=1)", "clear(radius=2)"),
    ],
)
def test_position_logits_become_channels(pattern):
    torch.manual_seed(0)
    grid, scale, pattern = (5, 7), 0.3, parse(pattern)
    q, k, v = (torch.randn(2, 3, 35, 8, dtype=torch.float64) for _ in range(3))
    tables = torch.randn(9, 8).double(), torch.randn(7, 8).double()  # one fits the axis, one is short
    wide_q, wide_k, wide_v = with_positions(q, k, v, tables, pattern, grid, scale)
    assert wide_q.shape == wide_k.shape == wide_v.shape and torch.equal(wide_v[..., :8], v)
    y, x = torch.arange(35) // 7, torch.arange(35) % 7
    rows = (y[:, None] - y).clamp(-4, 4) + 4
    columns = (x[:, None] - x).clamp(-3, 3) + 3
    wanted = scale * q @ k.mT
    wanted += torch.einsum("bhqd,qkd->bhqk", q, tables[0][rows] + tables[1][columns])
    visible = visattn.dense_mask(pattern, visattn.Layout(grid))
    assert ((scale * wide_q @ wide_k.mT) - wanted)[..., visible].abs().max() < 1e-12


@torch.no_grad()
def test_sam_on_a_map_of_another_size_equals_stock():
    model, _ = make("samvit_base_patch16_224", use_abs_pos=False)
    x = torch.randn(1, 3, 128, 80)
    stock = model(x)
    with visattn.apply(model, "na(window=99)") as handle:
        assert (model(x) - stock).abs().max() <= 1e-4 * stock.std()
        assert handle.report().sites[0].calls[0].problem.layout.grid == (8, 5)


@pytest.mark.parametrize("kind", ["RelPosBias", "RelPosBiasTf", "swin", "cr"])
@torch.no_grad()
def test_modules_of_relative_positions_become_rpb(kind):
    if kind in ("swin", "cr"):
        module = timm.layers.RelPosMlp((4, 3), num_heads=2, mode=kind).eval()
    else:
        module = getattr(timm.layers, kind)((4, 3), num_heads=2)
    randomise(module)
    rpb = rpb_of(module, Neighborhood(4), (4, 3))
    y, x = torch.arange(12) // 3, torch.arange(12) % 3
    found = rpb[:, y - y[:, None] + 3, x - x[:, None] + 3]
    assert torch.allclose(found, module.get_bias().view(2, 12, 12), atol=1e-6)
    wide = rpb_of(module, Neighborhood(6), (8, 8))
    assert torch.allclose(wide[:, 2:9, 3:8], rpb[:, :, 1:-1])
    assert torch.equal(wide[:, 0], wide[:, 2]) == (kind not in ("swin", "cr"))


def test_dropout_in_training_runs_stock_and_is_counted():
    model, x = make("samvit_base_patch16", attn_drop_rate=0.5)
    with visattn.apply(model.train(), "na(window=3)") as handle:
        model(x)
        assert handle.report().fallbacks == {"attention dropout 0.5 is on in training": 2}


@torch.no_grad()
def test_heads_with_patterns_of_their_own_carry_position_logits():
    model, x = make("samvit_base_patch16")
    outs = []
    for text in ("na(window=3)", "perhead(heads={0: na(window=3), 1-: na(window=3)})"):
        with visattn.apply(model, text, always=True):
            outs.append(model(x))
    assert torch.allclose(*outs, atol=1e-5)
    with pytest.raises(ValueError, match="has no logits of pairs of tokens"):
        visattn.apply(model, "gated(of=na(window=3))")


def test_refusals():
    with pytest.raises(ValueError, match=r"cannot carry the relative position bias of MaxxVit"):
        visattn.apply(make("test_maxvit")[0], "clear(radius=2)")
    with pytest.raises(ValueError, match=r"agent\(agents=2\) has no logits of pairs of tokens"):
        visattn.apply(make("samvit_base_patch16")[0], "agent(agents=2)")
    with pytest.raises(ValueError, match="grid attention sees a few tokens of the whole map"):
        visattn.apply(timm.create_model("maxxvitv2_nano_rw_256", device="meta"), "na(window=7)")
    rotary = {"use_rel_pos": False, "use_rope": True, "ref_feat_shape": ((6, 6), (3, 3))}
    model, x = make("samvit_base_patch16", **rotary, global_attn_indexes=(1,))
    with pytest.raises(ValueError, match="the rotary embedding of VisionTransformerSAM is one of its windows"):
        visattn.apply(model, "na(window=3)")
    stock = model(x)
    with visattn.apply(model, "na(window=99)", layers="blocks.1"):
        assert torch.allclose(model(x), stock, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patterns_without_a_bias_run_where_there_is_none():
    model, x = make("davit_tiny")
    for pattern in ("halo(block=4, halo=2)", "clear(radius=3)", "agent(agents=4)"):
        with visattn.apply(model, pattern) as handle:
            assert model(x).isfinite().all() and handle.report().sites_hit == 2
    model, x = make("samvit_base_patch16")
    for pattern in ("halo(block=3, halo=1)", "clear(radius=3)"):
        found = []
        for backend in ("auto", "reference"):
            with visattn.apply(model, pattern, backend=backend):
                found.append(model(x))
        assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def test_a_bias_that_ends_is_continued_with_its_outermost_entry():
    table = F.pad(torch.ones(1, 1, 1), (1, 1, 1, 1))
    module = timm.layers.RelPosBiasTf((2, 2), num_heads=1)
    with torch.no_grad():
        module.relative_position_bias_table.copy_(table)
        assert rpb_of(module, Neighborhood(3), (4, 4)).sum() == 1
