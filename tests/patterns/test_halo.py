import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import layouts, qkv, tiles
from tests.support.oracles import halo, mask_of, visited
from visattn import dense_mask, parse, plan
from visattn.kernels.halo_padded import halo_padded
from visattn.layout import Layout
from visattn.patterns import Halo


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_mask_and_plan(data):
    layout = data.draw(layouts())
    block = tuple(data.draw(st.sampled_from([-1, *range(1, n + 2)])) for n in layout.grid)
    reach = tuple(data.draw(st.integers(0, 4)) for _ in layout.grid)
    pattern = Halo(block, reach)
    truth = mask_of(lambda q, k: all(map(halo, q, k, layout.grid, block, reach)), layout)
    assert torch.equal(dense_mask(pattern, layout), truth)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), truth) and made.visible == truth.sum()
    assert pattern.covers(layout.grid) == bool(truth.all())
    assert str(parse(str(pattern))) == str(pattern)


def test_text():
    assert parse("halo(block=8x8, halo=3)") == Halo((8, 8), 3)
    assert str(Halo((8, 8), 3)) == "halo(block=8x8, halo=3)"


def test_queries_of_a_block_share_a_tile():
    assert Halo(8, 3).tile((64, 64)) == (8, 8)
    assert Halo(2, 2**31 - 1).covers((5, 4))
    assert plan(Halo(8, 0), Layout((64, 64))).full_share == 1.0


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("halo(block=0, halo=1)", (8,), r"block=0 must be a whole number of at least 1 or -1"),
        ("halo(block=8, halo=-1)", (8,), r"halo=-1 must be a whole number of at least 0"),
        ("halo(block=8)", (8,), r"halo needs halo, like halo\(block=8, halo=7\)"),
        ("halo(block=8x8, halo=1)", (8,), r"block=8x8 has 2 values but the grid has 1 axis"),
        ("halo(block=8, halo=1x1)", (8,), r"block=8x8 has 2 values but the grid has 1 axis: give 1 value"),
        ("halo(block=8x8, halo=1x1x1)", (8, 8), r"block and halo must have equally many axes"),
    ],
)
def test_errors(text, grid, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout(grid))


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"block_size": 4, "halo_size": 1}, (8, 12)),
        ({"block_size": 8, "halo_size": 3, "num_heads": 4}, (16, 8)),
        ({"block_size": 4, "halo_size": 2, "stride": 2}, (8, 8)),
        ({"block_size": 4, "halo_size": 0, "scale_pos_embed": True}, (8, 4)),
        ({"block_size": 2, "halo_size": 3, "dim_head": 8, "qkv_bias": True}, (4, 4)),
    ],
)
def test_unmasked_padding_equals_timm(options, grid):
    layers = pytest.importorskip("timm.layers.halo_attn")
    torch.manual_seed(0)
    module = layers.HaloAttn(16, 32, **{"num_heads": 2, **options}).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(2, 16, *grid, dtype=torch.float64)
    expected = module(x)
    heads, stride = module.num_heads, options.get("stride", 1)
    q, kv = module.q(x), module.kv(x)
    dims = [module.dim_head_qk, module.dim_head_v]
    q = q.flatten(2).transpose(1, 2).unflatten(2, (heads, dims[0]))
    # timm orders the channels of k and v as heads first, then key and value channels of each.
    k, v = kv.flatten(2).transpose(1, 2).unflatten(2, (heads, sum(dims))).split(dims, -1)
    relative = module.pos_embed.height_rel, module.pos_embed.width_rel
    if module.scale_pos_embed:
        relative = tuple(r * module.scale for r in relative)
    # A convolution's bias makes padding keys zero all the same: it is applied before the padding.
    out = halo_padded(
        q, k, v, grid, module.block_size, module.halo_size, stride=stride, scale=module.scale, relative=relative
    )
    out = out.flatten(2).transpose(1, 2).unflatten(2, [n // stride for n in grid])
    assert out.shape == expected.shape and (out - expected).abs().max() < 1e-10


def test_padding_changes_only_blocks_at_the_border():
    layout = Layout((12, 12))
    q, k, v = qkv(layout)
    masked = visattn.attention(q, k, v, Halo(4, 2), layout).unflatten(1, (12, 12))
    padded = halo_padded(q, k, v, (12, 12), 4, 2).unflatten(1, (12, 12))
    inner = (slice(None), slice(4, 8), slice(4, 8))
    assert (masked - padded)[inner].abs().max() < 1e-10 < (masked - padded).abs().max()


@pytest.mark.parametrize(("grid", "block", "stride"), [((12, 13), 4, 1), ((12, 12), 3, 2)])
def test_padding_needs_whole_blocks(grid, block, stride):
    q, k, v = qkv(Layout(grid))
    with pytest.raises(
        ValueError, match=r"HaloNet's padding is defined where the block divides the grid and the stride"
    ):
        halo_padded(q, k, v, grid, block, 1, stride=stride)
