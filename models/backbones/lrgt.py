"""LRGT: the encoder of a transformer for several views of an object, whose layers look within and across views.

Paper: Yang et al., "Long-Range Grouping Transformer for Multi-View 3D Reconstruction" (ICCV 2023), section 3. Most
layers attend within each view; a long-range grouping layer attends within groups of tokens that are spread over all
views (the pattern `groups(1xGxG)` on views x rows x columns), and adds a depthwise convolution of the values of each
view. The names are those of the released encoder, which keeps weights that it never uses: those are left out of files
as they are read. Its merger and decoder, which make voxels of the features, are not here.
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
from visattn.models.backbones.functional import fold_views, grouped, mean_token, resize, unfold_views, unscripted
from visattn.models.backbones.pyramid import drop_paths, init_weights

__all__ = ["LRGT"]


class GroupingAttention(nn.Module):
    """Attention within each view, or with `groups` above 0 within groups of tokens of all views."""

    def __init__(self, dim: int, num_heads: int, groups: int, **dd: Any) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} must be a multiple of the {num_heads} heads")
        self.num_heads, self.groups, self.scale = num_heads, groups, (dim // num_heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, **dd)
        self.to_k = nn.Linear(dim, dim, **dd)
        self.to_v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.IFS = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if groups else nn.Identity()

    def forward(self, x: torch.Tensor, views: int, height: int, width: int) -> torch.Tensor:
        """Tokens [B * views, height * width, dim] to the same shape."""
        batch, tokens, dim = x.shape
        shape = [batch, tokens, self.num_heads, dim // self.num_heads]
        values = self.to_v(x)
        q, k, v = self.to_q(x).reshape(shape), self.to_k(x).reshape(shape), values.reshape(shape)
        if self.groups > 0:
            whole = [batch // views, views * tokens, shape[2], shape[3]]
            q, k, v = q.reshape(whole), k.reshape(whole), v.reshape(whole)
            y = grouped(q, k, v, views, height, width, self.groups, self.scale).reshape(batch, tokens, dim)
            maps = values.transpose(1, 2).reshape(batch, dim, height, width)
            return self.proj(y + self.IFS(maps).flatten(2).transpose(1, 2))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(
        self, dim: int, num_heads: int, groups: int, mlp_ratio: float, drop_path: float, drop: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = GroupingAttention(dim, num_heads, groups, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, views: int, height: int, width: int) -> torch.Tensor:
        """Tokens [B * views, S, dim] of grids to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), views, height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LRGT(Flat):
    """The encoder, with a head over the mean of all tokens.

    Takes images [B, C, H, W] as single views, or several views of each object [B, V, C, H, W]. Images of whole patches
    of any size work: the position embedding is resampled.

    Args:
        img_size: Side of the images that positions are made for.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg" for the mean over tokens and views, "" for all tokens.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over channels.
        patch_group: Groups per axis of a view.
        lga_layer: Blocks that attend in groups.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        drop_rate: Dropout of the MLPs and before the head.
        device: Where the weights are made.
        dtype: Of the weights.
    """

    output_fmt = "NLC"
    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_group: int = 7,
        lga_layer: tuple[int, ...] = (5, 7, 9, 11),
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if patch_group < 1:
            raise ValueError(f"patch_group={patch_group} must be at least 1: groups per axis of a view")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = self.known_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, output_fmt="NHWC", **dd
        )
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        # The first two are for the class token and the distillation token of the weights that it starts from.
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + self.grid[0] * self.grid[1], embed_dim, **dd))
        rates = drop_paths(drop_path_rate, (depth,))[0]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, patch_group if i in lga_layer else 0, mlp_ratio, rate, drop_rate, **dd)
            for i, rate in enumerate(rates)
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)
        self.register_load_state_dict_pre_hook(_released)

    def embed(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
        """Images [B, C, H, W] or [B, V, C, H, W] to tokens [B * V, patches, dim]; views, rows, columns."""
        x, views = fold_views(x)
        x = self.patch_embed(x)
        height, width, dim = x.shape[1], x.shape[2], x.shape[3]
        places = self.pos_embed[:, 2:].transpose(1, 2).reshape(1, dim, self.grid[0], self.grid[1])
        places = resize(places, height, width).flatten(2).transpose(1, 2)
        return x.flatten(1, 2) + places, views, height, width

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to normed tokens: [B, patches, dim], of several views [B, V, patches, dim]."""
        images = x
        x, views, height, width = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, views, height, width)
            else:
                x = block(x, views, height, width)
        return unfold_views(self.norm(x), images)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits [B, num_classes], or to the pooled features with `pre_logits`."""
        if self.global_pool == "avg":
            x = mean_token(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits [B, num_classes]."""
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
        """Outputs of several blocks, and the features.

        Args:
            x: Images [B, C, H, W], or views [B, V, C, H, W], whose maps are those of B * V images.
            indices: Blocks to take: the last n for a number n, all for None.
            norm: Whether outputs pass the last norm.
            stop_early: Whether blocks after the last one taken are skipped.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Whether only the outputs are returned.

        Raises:
            ValueError: If `output_fmt` is neither.
        """
        self.known_format(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        images = x
        x, views, height, width = self.embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = (
                checkpoint(block, x, views, height, width)
                if self.grad_checkpointing
                else block(x, views, height, width)
            )
            if i in wanted:
                found.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            found = [y.transpose(1, 2).reshape(len(y), -1, height, width).contiguous() for y in found]
        if intermediates_only:
            return found
        return unfold_views(self.norm(x), images), found

    @unscripted
    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: the positions."""
        return {"pos_embed"}

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)" if coarse else blocks}


def _released(module: nn.Module, weights: dict[str, Any], *_: Any) -> None:
    """Make of a released file, in place, the weights of a model: without those that the encoder has and never uses."""
    found = weights.pop("encoder_state_dict", None)
    if isinstance(found, dict):
        # Beside them are the merger's and the decoder's.
        weights.clear()
        weights.update(found)
    for name in list(weights):
        own = re.sub(r"^(module\.)?encoder\.", "", name)
        value = weights.pop(name)
        block = re.match(r"blocks\.(\d+)\.attn\.IFS\.", own)
        layer = module.get_submodule(f"blocks.{block[1]}.attn.IFS") if block else None
        if own not in ("cls_token", "dist_token") and not isinstance(layer, nn.Identity):
            weights[own] = value


def _cfg() -> dict[str, Any]:
    origin = "https://github.com/LiyingCV/Long-Range-Grouping-Transformer"
    return cfg("MIT", "arXiv:2308.08724", origin, "patch_embed.proj", pool_size=None)


default_cfgs = generate_default_cfgs({f"lrgt_{size}.untrained": _cfg() for size in ("tiny", "small", "base")})


@register_model
def lrgt_tiny(pretrained: bool = False, **kwargs: Any) -> LRGT:
    """LRGT's encoder of the width of DeiT-T, 6.2 M parameters with the head."""
    size = {"embed_dim": 192, "num_heads": 3}
    return build(LRGT, "lrgt_tiny", pretrained, **{"out_indices": 3, **size, **kwargs})


@register_model
def lrgt_small(pretrained: bool = False, **kwargs: Any) -> LRGT:
    """LRGT's encoder of the width of DeiT-S."""
    size = {"embed_dim": 384, "num_heads": 6}
    return build(LRGT, "lrgt_small", pretrained, **{"out_indices": 3, **size, **kwargs})


@register_model
def lrgt_base(pretrained: bool = False, **kwargs: Any) -> LRGT:
    """LRGT's encoder as published, of the width of DeiT-B."""
    return build(LRGT, "lrgt_base", pretrained, **{"out_indices": 3, **kwargs})
