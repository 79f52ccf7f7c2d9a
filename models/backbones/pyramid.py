"""What every pyramid backbone here shares: the surface that timm expects around four stages of blocks."""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import nn

from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.stages import Blocks


class Pyramid(nn.Module):
    """A classifier on the last of several stages, with the features of each.

    A subclass builds its stages under the official names, calls `_finish`, and implements `forward_stages` and
    `keep_stages`. Its maps are NHWC unless it says otherwise.

    Attributes:
        num_classes: Classes of the head, 0 for none.
        num_features: Channels of the last stage.
        head_hidden_size: Channels that enter the head.
        feature_info: Channels, reduction and module of each stage.
        output_fmt: Order of the axes of stage maps.
    """

    output_fmt = "NHWC"

    def _finish(
        self,
        dims: tuple[int, ...],
        modules: tuple[str, ...],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        norm: nn.Module,
        device: Any,
        dtype: Any,
        projection: int | None = None,
    ) -> None:
        """Add the last norm, the pooling and the head, then initialise the weights.

        `projection` is the number of channels after `forward_last`, that of the last stage if None.
        """
        self.in_chans = in_chans
        self.num_stages = len(dims)
        self.num_classes = num_classes
        self.num_features = projection or dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": module}
            for i, (dim, module) in enumerate(zip(dims, modules, strict=True))
        ]
        self.norm = norm
        self.global_pool = self._pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(self.head_hidden_size, num_classes, device, dtype)
        self.apply(init_weights)

    def _pool(self, kind: str) -> SelectAdaptivePool2d:
        return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind), input_fmt=self.output_fmt)

    def _classifier(self, channels: int, classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
        """A new head, or nothing for no classes."""
        if classes == 0:
            return nn.Identity()
        head = nn.Linear(channels, classes, device=device, dtype=dtype)
        init_weights(head)
        return head

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """Maps of the stages listed in `take` (ascending), in `output_fmt`; later stages do not run."""
        raise NotImplementedError

    def keep_stages(self, count: int) -> None:
        """Drop every stage but the first `count`."""
        raise NotImplementedError

    def forward_last(self, x: torch.Tensor) -> torch.Tensor:
        """What follows the last stage, before the pooling: map to map, in `output_fmt`."""
        return self.norm(x)

    def drop_last(self) -> None:
        """Drop what `forward_last` does."""
        self.norm = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image [B, C, H, W] to the normed map of the last stage, in `output_fmt`."""
        return self.forward_last(self.forward_stages(x, [self.num_stages - 1])[0])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map to logits [B, num_classes], or to the pooled features with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image [B, C, H, W] to logits [B, num_classes]."""
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
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps of several stages, and the features.

        Args:
            x: Images [B, C, H, W].
            indices: Stages to take: the last n for a number n, all for None.
            norm: Whether the last stage's map passes the last norm.
            stop_early: Whether stages after the last one taken are skipped.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Whether only the maps are returned.

        Raises:
            ValueError: If `output_fmt` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(self.num_stages, indices)
        stop = last if stop_early else self.num_stages - 1
        maps = self.forward_stages(x, sorted({*wanted, stop}))
        features = self.forward_last(maps[-1]) if stop == len(self.feature_info) - 1 else maps[-1]
        by_stage = dict(zip(sorted({*wanted, stop}), maps, strict=True))
        if norm:
            by_stage[stop] = features
        found = [by_stage[i] if self.output_fmt == output_fmt else _swap(by_stage[i], output_fmt) for i in wanted]
        return found if intermediates_only else (features, found)

    @unscripted
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of some stages do not need; returns the stages taken.

        Args:
            indices: Stages to take, as in `forward_intermediates`.
            prune_norm: Whether to remove the last norm.
            prune_head: Whether to remove the head.
        """
        wanted, last = feature_take_indices(self.num_stages, indices)
        cut = last < self.num_stages - 1
        if prune_norm or cut:
            self.drop_last()
            self.num_features = self.feature_info[last]["num_chs"]
        if cut:
            self.keep_stages(last + 1)
            self.num_stages = last + 1
        if prune_head or cut:
            self.reset_classifier(0, "")
        return wanted

    @unscripted
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @unscripted
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @unscripted
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes removes it. `global_pool` "" removes the pooling, None keeps it."""
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
            self.global_pool.train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = self._classifier(self.head_hidden_size, num_classes, **get_device_dtype(self)).train(self.training)

    @unscripted
    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: position biases and embeddings."""
        words = ("rpb", "_bias", "bias_table", "pos_embed", "query_embedding", "cpb", "temperature")
        names = (name for name, parameter in self.named_parameters() if parameter.ndim > 1 or "cpb" in name)
        return {
            n for n in names if any(w in n for w in words) and not n.endswith(("pos_embed.weight", "learnable_bias"))
        }


def _swap(x: torch.Tensor, output_fmt: str) -> torch.Tensor:
    return (x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x.permute(0, 2, 3, 1)).contiguous()


def init_weights(module: nn.Module) -> None:
    """Normal weights cut at two deviations of 0.02 in linear layers, no bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def channels_of_head(dim: int, num_heads: int) -> int:
    """Channels per head.

    Raises:
        ValueError: If the heads do not divide the channels.
    """
    if dim % num_heads:
        raise ValueError(f"embed_dim {dim} must be a multiple of the {num_heads} heads")
    return dim // num_heads


def drop_paths(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Drop-path rates that grow block by block from 0 to `rate`, one list per stage."""
    flat = [float(r) for r in torch.linspace(0, rate, sum(depths), device="cpu")]
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [flat[end - depth : end] for end, depth in zip(ends, depths, strict=True)]
