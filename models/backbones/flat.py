"""What backbones of one sequence share: pooling, head, pruning and recomputation, as timm asks for them."""

from typing import Any, ClassVar

from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import nn

from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.pyramid import init_weights


class Flat(nn.Module):
    """A backbone whose layers keep the number of tokens.

    Attributes:
        pools: Values of `global_pool`.
        depth: Attribute with the layers whose outputs are features.
        embed_dim: Channels of the features.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg", "")
    depth: ClassVar[str] = "blocks"
    embed_dim: int

    @unscripted
    def known_pool(self, pool: str) -> str:
        """A value of `global_pool`, or a ValueError that names those there are."""
        if pool not in self.pools:
            *others, last = map(repr, self.pools)
            raise ValueError(f"global_pool {pool!r} must be {', '.join(others)} or {last}")
        return pool

    @unscripted
    def known_format(self, output_fmt: str) -> None:
        """Raise a ValueError for a format that intermediate outputs do not have."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW' or 'NLC'")

    @unscripted
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the outputs of some layers do not need; returns the layers taken."""
        layers = getattr(self, self.depth)
        wanted, last = feature_take_indices(len(layers), indices)
        setattr(self, self.depth, layers[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    @unscripted
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @unscripted
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @unscripted
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes removes it. `global_pool` None keeps the pooling."""
        if global_pool is not None:
            self.global_pool = self.known_pool(global_pool)
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)
        init_weights(self.head)
