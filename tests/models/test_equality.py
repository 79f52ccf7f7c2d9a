"""timm's own local attention next to ours, on timm's models: HaloNet's halo blocks, DaViT's windows."""

import pytest

pytest.importorskip("timm")

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.davit import SpatialBlock

from tests.golden.fill import fill_value
from visattn import Layout, attention, parse
from visattn.kernels.halo_padded import halo_padded
from visattn.positions import with_positions


def make(name, **kwargs):
    """A model whose random weights make attention matter."""
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(fill_value(key, parameter.shape))
    return model


def projected(module, x):
    """q, k, v [B, S, heads, D] of a HaloAttn; it orders channels as heads, then those of k and v."""
    dims = [module.dim_head_qk, module.dim_head_v]
    q, kv = (t.flatten(2).transpose(1, 2).unflatten(2, (module.num_heads, -1)) for t in (module.q(x), module.kv(x)))
    return q, *kv.split(dims, -1)


def tables(module):
    """Embeddings of relative rows and columns, as they are added to the logits."""
    factor = module.scale if module.scale_pos_embed else 1.0
    return module.pos_embed.height_rel * factor, module.pos_embed.width_rel * factor


def ours(module, x):
    """What a HaloAttn computes, by `halo_padded`."""
    grid, stride = tuple(x.shape[2:]), module.block_stride
    q, k, v = projected(module, x)
    block, halo = module.block_size, module.halo_size
    relative = tables(module)
    out = halo_padded(q, k, v, grid, block, halo, stride=stride, scale=module.scale, relative=relative)
    return module.pool(out.flatten(2).transpose(1, 2).unflatten(2, [n // stride for n in grid]))


def calls(model, kind, x):
    """Input and output of every module of a kind in one forward, and the model's output."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: found.append((module, args[0], out)))
        for module in model.modules()
        if isinstance(module, kind)
    ]
    out = model(x)
    for hook in hooks:
        hook.remove()
    return found, out


@pytest.mark.parametrize("name", ["halonet26t", "sehalonet33ts", "eca_halonext26ts"])
@torch.no_grad()
def test_halonet_equals_unmasked_halo(name, monkeypatch):
    model, x = make(name), torch.randn(1, 3, 256, 256)
    found, logits = calls(model, HaloAttn, x)
    assert len(found) >= 3
    for module, given, wanted in found:
        assert (ours(module, given) - wanted).abs().max() <= 1e-4 * wanted.std()
    monkeypatch.setattr(HaloAttn, "forward", ours)
    assert (model(x) - logits).abs().max() <= 1e-3 * logits.std()


@torch.no_grad()
def test_halonet_equals_the_pattern_where_no_padding_is():
    model, grid = make("halonet26t"), (24, 24)
    module = next(m for m in model.modules() if isinstance(m, HaloAttn) and m.block_stride == 1)
    given = torch.randn(1, module.q.in_channels, *grid)
    wanted, block, halo = module(given), module.block_size, module.halo_size
    assert (block, halo) == (8, 2)
    q, k, v = (t.transpose(1, 2) for t in projected(module, given))
    # Its tables are by key minus query, from the place in the window to that in the block; ours by query minus key.
    reach = block - 1 + halo
    flipped = tuple(table.flip(0)[: 2 * reach + 1] for table in tables(module))
    pattern = parse(f"halo(block={block}, halo={halo})")
    wide = with_positions(q, k, v, flipped, pattern, grid, module.scale)
    q, k, v = (t.transpose(1, 2) for t in wide)
    out = attention(q, k, v, pattern, Layout(grid), scale=module.scale)[..., : module.dim_head_v]
    out = out.flatten(2).transpose(1, 2).unflatten(2, grid)
    inner = (..., slice(8, 16), slice(8, 16))  # the block whose window lies on the map
    difference = (out - wanted).abs()
    assert difference[inner].max() <= 1e-4 * wanted.std() < difference.max()


@torch.no_grad()
def test_davit_equals_blocked_neighborhood():
    model = make("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8))
    found, _ = calls(model, SpatialBlock, torch.randn(1, 3, 224, 224))
    assert [tuple(given.shape[2:]) for _, given, _ in found] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    for block, given, wanted in found:
        grid, attn = tuple(given.shape[2:]), block.attn
        tokens = block.cpe1(given).flatten(2).transpose(1, 2)
        q, k, v = attn.qkv(block.norm1(tokens)).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
        y = attention(q, k, v, "na(window=7x7, stride=7x7)", Layout(grid))
        x = block.cpe2((tokens + attn.proj(y.flatten(2))).transpose(1, 2).unflatten(2, grid))
        tokens = x.flatten(2).transpose(1, 2)
        out = (tokens + block.mlp(block.norm2(tokens))).transpose(1, 2).unflatten(2, grid)
        assert (out - wanted).abs().max() <= 1e-4 * wanted.std()
