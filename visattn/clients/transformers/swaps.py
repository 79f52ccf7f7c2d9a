"""Attention modules that call no attention implementation: mixins that project and call their site instead.

A mixin is put before the class of a module for as long as the module is patched. Where the pattern does not run, the
module's own forward does, whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from visattn.clients.transformers.interface import Own
from visattn.clients.transformers.site import Site
from visattn.forwards import check_loaded, while_patched
from visattn.offsets import log_distances
from visattn.patterns import Dense
from visattn.positions import resized, with_positions


class Stock:
    """A module's own forward, as the attention that a call falls back to.

    Attributes:
        forward: That forward, with its arguments.
        result: What it gave, None where it has not run.
    """

    def __init__(self, site: Site, forward: Callable[[], Any]) -> None:
        self.site, self.forward, self.result = site, forward, None

    def __call__(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """Run it; stands for attention [B, S, H, D], which is computed only where somebody watches."""
        self.result = self.forward()
        if self.site.run.watcher is None:
            return q.transpose(1, 2), None
        return F.scaled_dot_product_attention(q, k, v, scale=options["scaling"]).transpose(1, 2), None


def run(
    site: Site, module: Any, tensors: tuple[torch.Tensor, ...], scale: float, dropout: float, stock: Stock, **more: Any
) -> torch.Tensor | None:
    """The pattern on q, k and v [B, H, S, D]: [B, S, H, D], or None where the stock forward ran instead."""
    q, k, v = tensors
    options = {"scaling": scale, "dropout": dropout, "is_causal": False, **more}
    out = site.attend(Own(stock, module, (q, k, v), None, options))
    return None if stock.result is not None else out


def stays_dense(site: Site) -> bool:
    """Whether the pattern does not run in this forward, whatever the call is."""
    if torch.compiler.is_compiling():
        return isinstance(site.runner.pattern, Dense)
    forward = site.run.forward
    return forward is None or forward.dense or isinstance(site.runner.pattern, Dense)


class SamVisionAttention:
    """SAM's attention on maps [B, H, W, C], with position logits that depend on the query."""

    visattn_site: Site | None

    def forward(self: Any, hidden_states: torch.Tensor, output_attentions: bool | None = None) -> Any:
        """As the module's own forward."""
        site = self.visattn_site
        own = functools.partial(super().forward, hidden_states, output_attentions)  # type: ignore[misc]
        if site is None:
            return own()
        batch, rows, columns, _ = hidden_states.shape
        grid = int(rows), int(columns)
        qkv = self.qkv(hidden_states).reshape(batch, rows * columns, 3, self.num_attention_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        channels = v.shape[3]
        if self.use_rel_pos and not stays_dense(site):
            pair = zip((self.rel_pos_h, self.rel_pos_w), grid, strict=True)
            tables = tuple(resized(table, 2 * n - 1) for table, n in pair)
            q, k, v = with_positions(q, k, v, tables, site.runner.pattern, grid, self.scale)
        dropout = self.dropout if self.training else 0.0
        stock = Stock(site, own)
        out = run(site, self, (q, k, v), self.scale, dropout, stock, output_attentions=output_attentions)
        if out is None:
            return stock.result
        return self.proj(out[..., :channels].reshape(batch, *grid, -1)), None


class HieraMaskUnitAttention:
    """Hiera's attention to the whole map, whose tokens are sorted by the pooling that later stages do."""

    visattn_site: Site | None

    def forward(self: Any, hidden_states: torch.Tensor, output_attentions: bool = False) -> Any:
        """As the module's own forward."""
        site = self.visattn_site
        own = functools.partial(super().forward, hidden_states, output_attentions)  # type: ignore[misc]
        if site is None:
            return own()
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        stock = Stock(site, own)
        out = run(site, self, (q, k, v), self.scale, 0.0, stock, output_attentions=output_attentions)
        return stock.result if out is None else (self.proj(out.flatten(2)), None)


class TimeSformerAttention:
    """TimeSformer's attention within each frame, of a class token and the patches."""

    visattn_site: Site | None

    def forward(self: Any, hidden_states: torch.Tensor, output_attentions: bool = False) -> Any:
        """As the module's own forward."""
        site = self.visattn_site
        own = functools.partial(super().forward, hidden_states, output_attentions)  # type: ignore[misc]
        if site is None:
            return own()
        attn, stock = self.attention, Stock(site, own)
        qkv = attn.qkv(hidden_states).unflatten(2, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = attn.attn_drop.p if self.training else 0.0
        out = run(site, self, (q, k, v), attn.scale, dropout, stock, output_attentions=output_attentions)
        return stock.result if out is None else (self.output(out.flatten(2)),)


class Swinv2Layer:
    """Swin v2's block: a neighborhood of the whole map with the position bias of its windows, and no shift."""

    visattn_site: Site | None

    def forward(
        self: Any, hidden_states: torch.Tensor, input_dimensions: Any, output_attentions: bool | None = False
    ) -> Any:
        """As the module's own forward."""
        site = self.visattn_site
        own = functools.partial(super().forward, hidden_states, input_dimensions, output_attentions)  # type: ignore[misc]
        if site is None:
            return own()
        attn, stock, rpb = self.attention.self, Stock(site, own), None
        shape = (*hidden_states.shape[:2], attn.num_attention_heads, attn.attention_head_size)
        projections = attn.query, attn.key, attn.value
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        if not stays_dense(site):
            check_loaded(attn, site.path)
            # Logits are cosines times a factor of each head.
            q = F.normalize(q, dim=-1) * attn.logit_scale.clamp(max=math.log(100.0)).exp()
            q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
            rpb = _bias_of(attn, site.runner.pattern, tuple(int(n) for n in input_dimensions)).to(v.dtype)
        dropout = attn.dropout.p if self.training else 0.0
        more = {"rpb": rpb, "local": True, "output_attentions": output_attentions}
        out = run(site, self, (q, k, v), 1.0, dropout, stock, **more)
        if out is None:
            return stock.result
        out = self.attention.output(out.flatten(2), hidden_states)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(out))
        fed = self.output(self.intermediate(hidden_states))
        return (hidden_states + self.drop_path(self.layernorm_after(fed)),)


def _bias_of(attn: Any, pattern: Any, grid: tuple[int, ...]) -> torch.Tensor:
    """The `rpb` of a neighborhood, from the small network that knows a bias for any distance."""
    weight = attn.continuous_position_bias_mlp[0].weight
    known = attn.pretrained_window_size if attn.pretrained_window_size[0] > 0 else attn.window_size
    coordinates = log_distances(pattern, grid, tuple(known), weight)
    return 16 * torch.sigmoid(attn.continuous_position_bias_mlp(coordinates)).permute(2, 0, 1)


@functools.lru_cache(maxsize=64)
def swapped_class(kind: type, mixin: type) -> type:
    """The class of a patched module."""
    made: Any = type(f"Swapped{kind.__name__}", (mixin, kind), {"__module__": __name__, "visattn_site": None})
    made.forward = while_patched(made, made.forward)
    return made
