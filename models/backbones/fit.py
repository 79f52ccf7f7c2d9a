"""FIT: data tokens attend in groups, a few latents of each group attend to all others, and both read each other.

Paper: Chen and Li, "FIT: Far-reaching Interleaved Transformers" (2023), https://arxiv.org/abs/2305.12689, section 2,
for images: a group is a square of patches. The released code is TensorFlow's and has no weights; with its weights under
the names here outputs are equal (`tests/models/test_fit.py`). The sizes are ours, of the widths of ViTs.
"""

import re
from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.flat import Flat
from visattn.models.backbones.functional import from_groups, resize, to_groups, unscripted
from visattn.models.backbones.pyramid import drop_paths, init_weights

__all__ = ["FIT"]


class Attention(nn.Module):
    """Softmax attention of tokens to others, `width` channels wide over all heads."""

    def __init__(self, dim: int, other: int, width: int, heads: int, **dd: Any) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"embed_dim {width} must be a multiple of the {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(n, width, **dd) for n in (dim, other, other))
        self.output = nn.Linear(width, dim, **dd)

    def forward(self, x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] and [B, N, other] -> [B, S, dim]."""
        q, k, v = self.query(x), self.key(others), self.value(others)
        q = q.reshape(q.shape[0], q.shape[1], self.heads, -1).transpose(1, 2)
        k = k.reshape(k.shape[0], k.shape[1], self.heads, -1).transpose(1, 2)
        v = v.reshape(v.shape[0], v.shape[1], self.heads, -1).transpose(1, 2)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention and an MLP, each behind a norm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, rate: float, drop: float, **dd: Any) -> None:
        super().__init__()
        self.mha_ln = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mha = Attention(dim, dim, dim, heads, **dd)
        self.mlp_ln = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(rate) if rate > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] alike."""
        y = self.mha_ln(x)
        x = x + self.drop_path(self.mha(y, y))
        return x + self.drop_path(self.mlp(self.mlp_ln(x)))


class Cross(nn.Module):
    """Tokens read others, each behind a norm, and add what they read."""

    def __init__(self, dim: int, other: int, heads: int, **dd: Any) -> None:
        super().__init__()
        self.cross_ln = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.enc_ln = nn.LayerNorm(other, eps=1e-6, **dd)
        self.cross_mha = Attention(dim, other, min(dim, other), heads, **dd)

    def forward(self, x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] and [B, N, other] -> [B, S, dim]."""
        return x + self.cross_mha(self.cross_ln(x), self.enc_ln(others))


class Local(nn.Module):
    """The last stage: local layers alone."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, rates: list[float], drop: float, **dd: Any) -> None:
        super().__init__()
        self.x_network = nn.Sequential(*(Layer(dim, heads, mlp_ratio, rate, drop, **dd) for rate in rates))

    def forward(self, x: torch.Tensor, latents: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B * groups, n, x_dim] alike, and the latents as they are."""
        return self.x_network(x), latents


class Stage(nn.Module):
    """Local layers, then latents that read their group, global layers of all latents, and groups that read those."""

    def __init__(
        self,
        local: int,
        dims: tuple[int, int],
        heads: tuple[int, int],
        mlp_ratio: float,
        rates: list[float],
        drop: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        layers = [Layer(dims[i >= local], heads[i >= local], mlp_ratio, r, drop, **dd) for i, r in enumerate(rates)]
        self.x_network = nn.Sequential(*layers[:local])
        self.l2x_cross_attn = Cross(dims[1], dims[0], min(heads), **dd)
        self.l_network = nn.Sequential(*layers[local:])
        self.x2l_cross_attn = Cross(dims[0], dims[1], min(heads), **dd)

    def forward(self, x: torch.Tensor, latents: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B * groups, n, x_dim] and latents [B * groups, m, latent_dim] alike."""
        x = self.x_network(x)
        latents = self.l2x_cross_attn(latents, x)
        shape = latents.shape
        latents = self.l_network(latents.reshape(shape[0] // groups, groups * shape[1], shape[2]))
        latents = latents.reshape(shape[0], shape[1], shape[2])
        return self.x2l_cross_attn(x, latents), latents


class FIT(Flat):
    """FIT for images, with a head over the mean of all tokens.

    Images of whole groups (`patch_size` times `group` pixels) of any size work: the latents' positions are resampled.

    Args:
        img_size: Side of the images that positions are made for.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg" for the mean over tokens, "" for all tokens.
        layers: Local layers in parentheses, then global ones, again and again: "(2)4(2)4(2)".
        embed_dim: Channels of tokens.
        latent_dim: Channels of latents.
        num_heads: Heads of tokens, and of latents.
        group: Patches per axis of a group.
        latents: Of each group.
        mlp_ratio: Hidden channels of the MLPs over channels.
        drop_path_rate: Chance to skip the last layer in training; earlier layers have less.
        drop_rate: Dropout of the MLPs and before the head.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If the layers are written otherwise or end with global ones, or sizes do not fit.
    """

    depth = "stages"
    output_fmt = "NLC"
    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layers: str = "(2)4(2)4(2)",
        embed_dim: int = 384,
        latent_dim: int = 384,
        num_heads: tuple[int, int] = (6, 6),
        group: int = 7,
        latents: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        counts = layer_counts(layers)
        if img_size % (patch_size * group):
            raise ValueError(f"img_size {img_size} must be a multiple of a group's {patch_size * group} pixels")
        self.in_chans, self.num_classes, self.group, self.latents = in_chans, num_classes, group, latents
        self.global_pool = self.known_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.stem = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, output_fmt="NHWC", **dd
        )
        self.stem_ln = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.side = img_size // (patch_size * group)
        self.x_pos_emb = nn.Parameter(torch.empty(group * group, embed_dim, **dd))
        self.latent_pos_emb = nn.Parameter(torch.empty(self.side * self.side, latents, latent_dim, **dd))
        rates = drop_paths(drop_path_rate, tuple(map(sum, counts)))
        dims = embed_dim, latent_dim
        stages: list[nn.Module] = [
            Stage(local, dims, num_heads, mlp_ratio, own, drop_rate, **dd)
            for (local, _), own in zip(counts[:-1], rates[:-1], strict=True)
        ]
        stages.append(Local(embed_dim, num_heads[0], mlp_ratio, rates[-1], drop_rate, **dd))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"stages.{i}"} for i in range(len(counts))
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        for table in (self.x_pos_emb, self.latent_pos_emb):
            trunc_normal_(table, std=0.02)
        self.apply(init_weights)

    def embed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Images [B, C, H, W] to tokens [B * groups, n, dim], latents [B * groups, m, dim], rows and columns."""
        x = self.stem_ln(self.stem(x))
        batch, height, width = x.shape[0], x.shape[1], x.shape[2]
        rows, columns = height // self.group, width // self.group
        x = to_groups(x, self.group) + self.x_pos_emb
        latents = latent_places(self.latent_pos_emb, self.side, rows, columns)
        return x, latents.repeat(batch, 1, 1), height, width

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to normed tokens [B, patches, dim], row by row."""
        x, latents, height, width = self.embed(x)
        groups = (height // self.group) * (width // self.group)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, latents = checkpoint(stage, x, latents, groups)
            else:
                x, latents = stage(x, latents, groups)
        return self.norm(from_groups(x, self.group, height, width))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits [B, num_classes], or to the pooled features with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @unscripted
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens after several stages, and the features; arguments as of timm's.

        Raises:
            ValueError: If `output_fmt` is neither "NCHW" nor "NLC".
        """
        self.known_format(output_fmt)
        wanted, last = feature_take_indices(len(self.stages), indices)
        x, latents, height, width = self.embed(x)
        groups = (height // self.group) * (width // self.group)
        found = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            if self.grad_checkpointing:
                x, latents = checkpoint(stage, x, latents, groups)
            else:
                x, latents = stage(x, latents, groups)
            if i in wanted:
                y = from_groups(x, self.group, height, width)
                found.append(self.norm(y) if norm else y)
        if output_fmt == "NCHW":
            found = [y.transpose(1, 2).reshape(len(y), -1, height, width).contiguous() for y in found]
        return found if intermediates_only else (self.norm(from_groups(x, self.group, height, width)), found)

    @unscripted
    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: the positions."""
        return {"x_pos_emb", "latent_pos_emb"}

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem|x_pos_emb|latent_pos_emb", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def latent_places(table: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    """Positions of latents [side * side, m, latent_dim] for other groups: [rows * columns, m, latent_dim]."""
    places = table.flatten(1).T.reshape(1, -1, side, side)
    places = resize(places, rows, columns).flatten(2)[0].T
    return places.reshape(rows * columns, table.shape[1], table.shape[2])


def layer_counts(layers: str) -> list[tuple[int, int]]:
    """Local and global layers of each stage of "(2)4(2)".

    Raises:
        ValueError: If it is written otherwise, or ends with global layers, whose tokens nobody would read.
    """
    if not re.fullmatch(r"(\(\d+\)[1-9]\d*)*\([1-9]\d*\)", layers):
        raise ValueError(
            f"layers {layers!r} must be numbers of local layers in parentheses and of global ones between, with "
            "local ones at the end, like '(2)4(2)4(2)'"
        )
    return [(int(local), int(far or 0)) for local, far in re.findall(r"\((\d+)\)(\d*)", layers)]


def _cfg() -> dict[str, Any]:
    origin = "https://github.com/google-research/pix2seq"
    return cfg("Apache-2.0", "arXiv:2305.12689", origin, "stem.proj", pool_size=None)


default_cfgs = generate_default_cfgs({f"fit_{size}.untrained": _cfg() for size in ("tiny", "small", "base")})


@register_model
def fit_tiny(pretrained: bool = False, **kwargs: Any) -> FIT:
    """FIT of the width of ViT-Ti, tokens of 8 pixels."""
    size = {"embed_dim": 192, "latent_dim": 192, "num_heads": (3, 3)}
    return build(FIT, "fit_tiny", pretrained, **{"out_indices": 3, **size, **kwargs})


@register_model
def fit_small(pretrained: bool = False, **kwargs: Any) -> FIT:
    """FIT of the width of ViT-S, tokens of 8 pixels."""
    return build(FIT, "fit_small", pretrained, **{"out_indices": 3, **kwargs})


@register_model
def fit_base(pretrained: bool = False, **kwargs: Any) -> FIT:
    """FIT of the width of ViT-B, tokens of 8 pixels."""
    size = {"embed_dim": 768, "latent_dim": 768, "num_heads": (12, 12)}
    return build(FIT, "fit_base", pretrained, **{"out_indices": 3, **size, **kwargs})
