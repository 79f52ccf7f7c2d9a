"""The backbones against outputs and key lists of the original implementations."""

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch import nn

from tests.golden.fill import fill, fill_value, make_input
from tests.support.places import GOLDEN
from visattn.models.backbones.agent_deit import AgentDeit
from visattn.models.backbones.agent_swin import AgentSwin
from visattn.models.backbones.biformer import BiFormer, BiLevelRoutingAttention
from visattn.models.backbones.flowformer import Flowformer
from visattn.models.backbones.mala import Block as MALABlock
from visattn.models.backbones.mala import RoPE
from visattn.models.backbones.moh_vit import MoHViT
from visattn.models.backbones.nat import NAT


def _biformer(config):
    names = ("depth", "embed_dim", "mlp_ratios", "n_win", "topks", "head_dim", "side_dwconv", "num_classes")
    return BiFormer(**{name: config[name] for name in names})


def _moh_vit(config):
    return MoHViT(**{name: value for name, value in config.items() if name != "qkv_bias"})


def _routing(config):
    return BiLevelRoutingAttention(
        config["dim"], config["num_heads"], config["n_win"], config["topk"], config["side_dwconv"]
    )


class _MALA(nn.Module):
    """One block of MAViT with its positions, under the names of the golden files."""

    def __init__(self, config):
        super().__init__()
        dim, heads = config["embed_dim"], config["num_heads"]
        scale = 1.0 if config["layerscale"] else None
        self.rope = RoPE(dim, heads)
        self.blk = MALABlock(dim, heads, config["flag"] == "l", config["ffn_dim"], 0.0, scale)

    def forward(self, x):
        return self.blk(x, self.rope(x.shape[2], x.shape[3]))


CASES = {
    "dinat_mini": lambda config: NAT(**config),
    "biformer_micro": _biformer,
    "bra_op_autopad": _routing,
    "agent_deit_micro_mixed": lambda config: AgentDeit(**config),
    "agent_swin_micro_mixed": lambda config: AgentSwin(**config),
    "moh_vit_micro": _moh_vit,
    "mala_block_l": _MALA,
    "mala_block_v": _MALA,
    "flowformer_micro": lambda config: Flowformer(**config),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_keys_of_the_original(name):
    golden = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    model = fill(CASES[name](golden["config"]))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        k: tuple(v) for k, v in golden["keys"].items()
    }
    with torch.no_grad():
        found = model(make_input(golden["input_shapes"][0], golden["input_seed"])).flatten()
    wanted = golden["output"].flatten()
    assert (found[: len(wanted)] - wanted).abs().max() <= 1e-4 * wanted.std()


def test_moh_computes_the_same_with_and_without_unused_heads():
    golden = torch.load(GOLDEN / "moh_vit_micro.pt", weights_only=True)
    model = fill(_moh_vit(golden["config"]))
    x = make_input((2, 3, 64, 96))
    with torch.no_grad():
        dense = model(x)
        for block in model.block4:
            block.attn.skip_from = 0
        assert torch.allclose(model(x), dense, rtol=1e-4, atol=1e-5)


def test_views_of_an_object_are_those_of_the_original(tmp_path):
    golden = torch.load(GOLDEN / "lrgt_micro.pt", weights_only=True)
    # As released: behind the name of the encoder, with what it keeps and never uses.
    filled = {f"module.encoder.{key}": fill_value(key, shape) for key, shape in golden["keys"].items()}
    torch.save({"encoder_state_dict": filled}, tmp_path / "file.pth")
    config = golden["config"] | {"num_classes": 0, "global_pool": ""}
    model = timm.create_model("lrgt_base", checkpoint_path=str(tmp_path / "file.pth"), **config).eval()
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    unused = {
        "cls_token",
        "dist_token",
        *(f"blocks.{i}.attn.IFS.{part}" for i in (0, 2) for part in ("weight", "bias")),
    }
    assert own == {key: tuple(shape) for key, shape in golden["keys"].items() if key not in unused}
    x = make_input(golden["input_shapes"][0], golden["input_seed"])
    with torch.no_grad():
        found = model(x)
        assert found.flatten(0, 1).shape == golden["output_shape"]
        wanted = golden["output"]
        assert (found.flatten()[:: golden["output_stride"]][: len(wanted)] - wanted).abs().max() <= 1e-5 * wanted.std()
        # One view alone is another thing, and the head takes the mean of all.
        assert (model(x[:, 0]) - found[:, 0]).abs().max() > 1e-3
        pooled = timm.create_model("lrgt_base", **golden["config"], num_classes=2).eval()
        out, maps = pooled.forward_intermediates(x, indices=[1, 3])
        assert pooled(x).shape == (2, 2) and out.shape == (2, 3, 196, 24)
        assert [tuple(each.shape) for each in maps] == [(6, 24, 14, 14)] * 2
        assert torch.allclose(pooled.forward_head(out, pre_logits=True), out.mean((1, 2)))


DILATIONS = {"dinat_tiny": (8, 4, 2, 1), "nat_tiny": (1, 1, 1, 1)}


@pytest.mark.parametrize("name", DILATIONS)
def test_dilations(name):
    model = timm.create_model(name, device="meta")
    for level, step in zip(model.levels, DILATIONS[name], strict=True):
        assert [b.attn.dilation for b in level.blocks] == [step if i % 2 else 1 for i in range(len(level.blocks))]
