"""Agent-PVT has no stored output of the original: its keys and its maths, written out from the paper in float64."""

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch.nn import functional as F

from tests.golden.fill import fill, make_input
from visattn.models.backbones.agent_pvt import AgentPVT

AGENTS = (9, 16, 49, 49)


def keys_of_stage(stage, channels, dim, heads, side, agents, depth, ratio):
    """Official parameter names and shapes of stage 1, 2, 3 or 4."""
    patch = 2 if stage > 1 else 4
    found = {
        f"pos_embed{stage}": (1, side * side, dim),
        f"patch_embed{stage}.proj.weight": (dim, channels, patch, patch),
        f"patch_embed{stage}.proj.bias": (dim,),
        f"patch_embed{stage}.norm.weight": (dim,),
        f"patch_embed{stage}.norm.bias": (dim,),
    }
    block = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.an_bias": (heads, agents, 7, 7),
        "attn.na_bias": (heads, agents, 7, 7),
        "attn.ah_bias": (1, heads, agents, side, 1),
        "attn.aw_bias": (1, heads, agents, 1, side),
        "attn.ha_bias": (1, heads, side, 1, agents),
        "attn.wa_bias": (1, heads, 1, side, agents),
        "attn.q.weight": (dim, dim),
        "attn.q.bias": (dim,),
        "attn.kv.weight": (2 * dim, dim),
        "attn.kv.bias": (2 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "attn.dwc.weight": (dim, 1, 3, 3),
        "attn.dwc.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (ratio * dim, dim),
        "mlp.fc1.bias": (ratio * dim,),
        "mlp.fc2.weight": (dim, ratio * dim),
        "mlp.fc2.bias": (dim,),
    }
    return found | {f"block{stage}.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}


DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}


@pytest.mark.parametrize("size", DEPTHS)
def test_official_keys(size):
    wanted = {"head.weight": (1000, 512), "head.bias": (1000,)}
    channels = (3, 64, 128, 320, 512)
    for i, depth in enumerate(DEPTHS[size]):
        of_stage = (channels[i], channels[i + 1], (1, 2, 5, 8)[i], 56 // 2**i, AGENTS[i], depth, (8, 8, 4, 4)[i])
        wanted |= keys_of_stage(i + 1, *of_stage)
    model = timm.create_model(f"agent_pvt_{size}", device="meta")
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == wanted


def attention(x, height, width, heads, agents, p):
    """Agent attention of tokens [B, N, C] as two softmax matrices; p gives the parameters by name."""
    batch, tokens, dim = x.shape
    side = int(agents**0.5)

    def split(y):
        return y.reshape(batch, -1, heads, dim // heads).transpose(1, 2)

    def bias(coarse, rows, columns):
        """[heads, agents, tokens] from a coarse map and its two axes, all [heads, agents, ., .]."""
        whole = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        return (whole + rows + columns).flatten(2)

    q = F.linear(x, p["q.weight"], p["q.bias"])
    kv = F.linear(x, p["kv.weight"], p["kv.bias"]).reshape(batch, tokens, 2, dim)
    k, v = kv[:, :, 0], kv[:, :, 1]
    pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(batch, dim, height, width), side)
    a = split(pooled.flatten(2).transpose(1, 2))
    b1 = bias(p["an_bias"], p["ah_bias"][0], p["aw_bias"][0])
    last_to_front = (0, 3, 1, 2)
    b2 = bias(p["na_bias"], p["ha_bias"][0].permute(last_to_front), p["wa_bias"][0].permute(last_to_front))
    scale = (dim // heads) ** -0.5
    gathered = (scale * a @ split(k).transpose(2, 3) + b1).softmax(-1) @ split(v)
    y = (scale * split(q) @ a.transpose(2, 3) + b2.transpose(1, 2)).softmax(-1) @ gathered
    image = v.transpose(1, 2).reshape(batch, dim, height, width)
    local = F.conv2d(image, p["dwc.weight"], p["dwc.bias"], padding=1, groups=dim)
    y = y.transpose(1, 2).reshape(batch, tokens, dim) + local.flatten(2).transpose(1, 2)
    return F.linear(y, p["proj.weight"], p["proj.bias"])


def below(weights, prefix):
    """The weights whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def forward(x, weights, num_heads):
    """Logits of images x, of a model with one block per stage, at the size that it was made for."""
    for i, heads in enumerate(num_heads):
        patch = below(weights, f"patch_embed{i + 1}.")
        block = below(weights, f"block{i + 1}.0.")
        x = F.conv2d(x, patch["proj.weight"], patch["proj.bias"], stride=patch["proj.weight"].shape[-1])
        dim, height, width = x.shape[1:]
        x = x.flatten(2).transpose(1, 2)
        x = F.layer_norm(x, (dim,), patch["norm.weight"], patch["norm.bias"], 1e-5) + weights[f"pos_embed{i + 1}"]
        y = F.layer_norm(x, (dim,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        x = x + attention(y, height, width, heads, AGENTS[i], below(block, "attn."))
        y = F.layer_norm(x, (dim,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + F.linear(y, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
        x = x.transpose(1, 2).reshape(-1, dim, height, width)
    return F.linear(x.mean((2, 3)), weights["head.weight"], weights["head.bias"])


# The last map of 112 pixels is 7 // 2 = 3 tokens wide: a row and a column of the map before it are left over.
@pytest.mark.parametrize("side", [64, 112])
def test_output_is_that_of_the_equations(side):
    heads = (1, 2, 5, 8)
    model = fill(
        AgentPVT(img_size=side, embed_dims=(16, 32, 40, 64), num_heads=heads, depths=(1, 1, 1, 1), num_classes=10)
    )
    x = make_input((2, 3, side, side))
    wanted = forward(x.double(), {name: value.double() for name, value in model.state_dict().items()}, heads)
    with torch.no_grad():
        found = model(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.std()
