"""`visattn.apply` on timm's families of several stages, branches and kinds of windows, each a small model."""

import copy
import math

import pytest

pytest.importorskip("timm")

import torch
from torch.nn import functional as F

import visattn
from tests.support.tiny_timm import FAMILIES, make, records_shown
from visattn.models.swap.records import name_of_record
from visattn.models.swap.sites import find_sites
from visattn.patterns import Neighborhood

# Side of the windows that a module's own attention cuts its map into, where it does.
WINDOWS = {
    "MaskUnitAttention": lambda m: math.isqrt(m.window_size) if m.use_mask_unit_attn else 0,
    "MultiScaleBlock": lambda m: m.window_size[0],
    "LocallyGroupedAttn": lambda m: m.ws,
    "TinyVitBlock": lambda m: m.window_size,
    "GlobalContextVitBlock": lambda m: m.window_size[0],
    "SwinTransformerV2CrBlock": lambda m: m.window_size[0],
    "LocalWindowAttention": lambda m: m.attn.resolution,
    "SHMA": lambda m: m.window_size,
}
# Families some of whose modules stay as they are, and why.
PARTLY = {
    "convit": "it mixes its softmax with one of positions, by a gate",
    "gcvit": "its queries are one window's, made of the whole image",
}


def stock_pattern(family, module):
    """What a module's own attention is, as a pattern: of the whole map, of windows, or of windows of pooled queries."""
    side = side_of(family, module)
    if not side:
        return "na(window=99)"
    if type(module).__name__ == "MaskUnitAttention" and module.q_stride > 1:
        return f"halo(block={side}, halo=0)"
    if type(module).__name__ == "MultiScaleBlock" and module.q_stride:
        return f"halo(block={side // module.q_stride[0]}, halo=0)"
    return f"na(window={side}, stride={side})"


def side_of(family, module):
    """The side of a module's windows, 0 for the whole map."""
    return 4 if family == "nest" else WINDOWS.get(type(module).__name__, lambda m: 0)(module)


def swappable(model):
    """The modules that can be swapped, by path."""
    return {site.name.path: site.module for site in find_sites(model, "model") if not site.foreign}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_windows_as_patterns_equal_stock_and_undo_is_exact(family):
    model, x = make(family)
    stock, keys, kinds = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    patterns = {path: stock_pattern(family, module) for path, module in swappable(model).items()}
    for backend in ("auto", "reference"):
        with visattn.apply(model, patterns, backend=backend, strict=True) as handle:
            assert (model(x) - stock).abs().max() <= 1e-4 * stock.std()
            report = handle.report()
            assert report.sites_hit == len(report.sites) == len(patterns) > 0 and report.fallbacks == {}
            assert list(model.state_dict()) == keys
    with visattn.apply(model, "na(window=2)") as handle:
        assert (model(x) - stock).abs().max() > 1e-3 * stock.std()
        assert set(handle.report().fallbacks) == {PARTLY[family]} if family in PARTLY else not handle.report().fallbacks
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), stock)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Masked:
    """Stock attention of some modules under masks: what softmax sees while one of them runs."""

    def __init__(self, monkeypatch, modules, masks):
        self.mask, self.used = None, 0
        for path, module in modules.items():
            monkeypatch.setattr(module, "forward", self.under(module.forward, masks[path]))
        softmax, attend = torch.Tensor.softmax, F.scaled_dot_product_attention

        def masked_softmax(logits, dim):
            return softmax(
                logits if self.mask is None else logits.masked_fill(~self.fit(logits.shape), -torch.inf), dim
            )

        def masked_attention(q, k, v, attn_mask=None, **kwargs):
            if self.mask is not None:
                hidden = torch.zeros(()).masked_fill(~self.fit((q.shape[-2], k.shape[-2])), -torch.inf)
                attn_mask = hidden if attn_mask is None else attn_mask + hidden
            return attend(q, k, v, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(torch.Tensor, "softmax", masked_softmax)
        monkeypatch.setattr(F, "scaled_dot_product_attention", masked_attention)

    def fit(self, shape):
        assert tuple(shape[-2:]) == tuple(self.mask.shape)
        self.used += 1
        return self.mask

    def under(self, forward, mask):
        def masked(*args, **kwargs):
            self.mask = mask
            try:
                return forward(*args, **kwargs)
            finally:
                self.mask = None

        return masked


def mask_of(layout, module):
    """Which tokens a window of 2 shows to which, in the order in which the module has them."""
    mask = visattn.dense_mask(Neighborhood(2), layout)
    if type(module).__name__ != "MaskUnitAttention":
        return mask
    # Hiera has one pooling left: first come the tokens at the upper left of each 2 x 2 that it pools.
    rows, columns = layout.grid
    order = torch.arange(layout.tokens).view(rows // 2, 2, columns // 2, 2).permute(1, 3, 0, 2).flatten()
    return mask[order][:, order]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_window_equals_stock_under_its_mask(family, monkeypatch):
    model, x = make(family)
    stock = model(x)
    with visattn.apply(model, "na(window=2)") as handle:
        model(x)
        layouts = {site.site: site.calls[0].problem.layout for site in handle.report().sites if site.calls}
    modules = swappable(model)
    sides = {path: side_of(family, module) for path, module in modules.items()}
    # Where its own windows are the whole map.
    shown = {path: max(layouts[path].keys.grid) <= (sides[path] or 99) for path in modules}
    modules = {path: module for path, module in modules.items() if shown[path] and max(layouts[path].grid) > 2}
    assert modules and records_shown(family) <= {name_of_record(module) for module in modules.values()}
    with visattn.apply(model, dict.fromkeys(modules, "na(window=2)"), strict=True):
        found = model(x)
    masked = Masked(monkeypatch, modules, {path: mask_of(layouts[path], module) for path, module in modules.items()})
    wanted = model(x)
    assert masked.used >= len(modules)
    assert (wanted - stock).abs().max() > 1e-4 * stock.std()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient_that_equals_stock(family):
    model, x = make(family)
    model, x = model.double(), x[:1].double()
    patterns = {path: stock_pattern(family, module) for path, module in swappable(model).items()}
    grads = []
    for swapped in (False, True):
        model.zero_grad()
        model.train().eval()  # some keep their biases between forwards, with the graph that made them
        if swapped:
            visattn.apply(model, patterns, backend="reference")
        model(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() <= 1e-6 * grad.abs().max() + 1e-9, name


@torch.no_grad()
def test_every_stage_follows_images_of_any_size():
    model, _ = make("caformer")
    handle = visattn.apply(model, "na(window=2)")
    for height, width in ((96, 128), (128, 64)):
        model(torch.randn(1, 3, height, width))
    grids = [[call.problem.layout.grid for call in site.calls] for site in handle.report().sites]
    assert [sorted(each) for each in grids] == [[(6, 8), (8, 4)], [(3, 4), (4, 2)]]


@pytest.mark.parametrize("family", ["caformer", "mobilevit"])
def test_recomputed_blocks_have_the_grid_of_their_own_forward(family):
    model, _ = make(family)
    # As many tokens in every stage.
    images = [torch.randn(1, 3, *size) for size in ((64, 128), (128, 64))]
    visattn.apply(model, "na(window=2)")
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        # Every forward comes before the first backward pass.
        for out in [model(x) for x in images][::-1]:
            out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", ["hiera", "caformer"])
@torch.no_grad()
def test_copies_compiled_and_exported_models(family):
    model, x = make(family)
    handle = visattn.apply(model, "na(window=2)")
    swapped, copied = model(x), copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), swapped, rtol=1e-3, atol=1e-4)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), swapped, rtol=1e-3, atol=1e-4)
    handle.remove()
    assert not torch.equal(model(x), swapped)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("family", ["volo", "twins", "nest", "visformer"])
def test_attention_dropout_in_training_runs_stock_and_is_counted(family):
    model, x = make(family)
    modules = list(swappable(model).values())
    for module in modules:
        module.attn_drop.p = 0.5
    with visattn.apply(model.train(), "na(window=2)") as handle:
        model(x).sum().backward()
        reasons = handle.report().fallbacks
    assert reasons["attention dropout 0.5 is on in training"] == len(modules)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_masked_hiera_runs_stock_and_is_counted():
    model, x = make("hiera")
    mask = torch.zeros(2, math.prod(model.mask_spatial_shape), dtype=torch.bool)
    mask[:, :2] = True
    stock = model.forward_features(x, mask=mask)
    with visattn.apply(model, "na(window=2)") as handle:
        assert torch.equal(model.forward_features(x, mask=mask), stock)
        assert "a mask drops tokens, and the rest is no grid" in handle.report().fallbacks


@torch.no_grad()
def test_batches_of_gemma_that_are_ragged():
    model, _ = make("gemma4", global_pool="avg")
    grids = [(6, 6), (3, 6)]
    batch = {"patches": torch.rand(2, 36, 768), "patch_coord": torch.full((2, 36, 2), -1)}
    batch["patch_valid"] = torch.zeros(2, 36, dtype=torch.bool)
    for i, (rows, columns) in enumerate(grids):
        batch["patch_coord"][i, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][i, : rows * columns] = True
    stock = model(batch)
    with visattn.apply(model, "na(window=99)", backend="reference"):
        assert (model(batch) - stock).abs().max() <= 1e-4 * stock.std()
    with visattn.apply(model, "na(window=2)") as handle:
        found = model(batch)
        assert {call.problem.layout.grid for call in handle.report().sites[0].calls} == set(grids)
    alone = {name: value[1:, :18] for name, value in batch.items()}
    with visattn.apply(model, "na(window=2)"):
        assert (model(alone) - found[1:]).abs().max() <= 1e-4 * found.std()


@torch.no_grad()
def test_images_of_a_size_that_a_model_was_not_made_for_are_named():
    model, _ = make("levit")
    visattn.apply(model, "na(window=2)")
    with pytest.raises(ValueError, match=r"was made for a grid of 4x4 and got \[1, 64, 128\]: give the images"):
        model(torch.randn(1, 3, 128, 128))


def test_position_terms_take_patterns_that_can_carry_them():
    for family in ("tiny_vit", "levit", "swinv2_cr", "gcvit", "efficientvit", "efficientformer"):
        with pytest.raises(ValueError, match=r"cannot carry the relative position bias"):
            visattn.apply(make(family)[0], "clear(radius=2)")
    with pytest.raises(ValueError, match=r"agent\(agents=2\) has no logits of pairs of tokens"):
        visattn.apply(make("mvitv2")[0], "agent(agents=2)")
    for family in ("pvt_v2", "twins", "hiera", "sam2", "mobilenetv4"):
        with pytest.raises(ValueError, match=r"topk\(.* is for queries and keys of one grid, and a module of"):
            visattn.apply(make(family)[0], "topk(0.5)")
    model, x = make("mvitv2")
    with torch.no_grad():
        found = []
        for backend in ("auto", "reference"):
            with visattn.apply(model, "clear(radius=2)", backend=backend):
                found.append(model(x))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)
