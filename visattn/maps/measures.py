"""What the attention of a call says about each query, by further calls of attention with other values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from visattn.attend import attention
from visattn.given import tensor
from visattn.layout import Layout
from visattn.operands import wide_dtype
from visattn.patterns import Dense, DynamicPattern, ListedPattern, Pattern, PerHead, PooledPattern, parse
from visattn.recorded import Recorded, check_recorded


@dataclass(frozen=True)
class Spread:
    """Where each query's dense attention lies, and how far it spreads.

    Attributes:
        mass: Share on the grid, the rest is on dense tokens such as text [B, S, H].
        mean: Sum of weight times position over the grid, in shares of the grid's diagonal around its centre
            [B, S, H, dims].
        second: Sum of weight times squared distance of the key from the centre, in squared diagonals [B, S, H].
        squared: Sum of weight times squared distance of query and key, likewise; of queries of the grid
            [B, tokens, H].
        entropy: Of the weights, in shares of the logarithm of the number of keys that may be attended [B, S, H].
        lse: Log-sum-exp of the logits [B, S, H].
        layout: Where the tokens sit.
    """

    mass: torch.Tensor
    mean: torch.Tensor
    second: torch.Tensor
    squared: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    layout: Layout

    @property
    def grid(self) -> slice:
        """The tokens of the grid."""
        return slice(self.layout.prefix, self.layout.prefix + self.layout.tokens)

    @property
    def distance(self) -> torch.Tensor:
        """Root mean squared distance of a grid query's keys on the grid, in shares of its diagonal [B, tokens, H]."""
        return (self.squared / self.mass[:, self.grid].clamp(min=1e-12)).clamp(min=0).sqrt()

    @property
    def offset(self) -> torch.Tensor:
        """Mean key position minus query position of grid queries, in shares of the diagonal [B, tokens, H, dims]."""
        where = positions(self.layout).to(self.mean)[:, None]
        return self.mean[:, self.grid] / self.mass[:, self.grid, :, None].clamp(min=1e-12) - where


def wide(call: Recorded) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in float32 at least."""
    q, k = call.q.detach(), call.k.detach()
    dtype = wide_dtype(q)
    return q.to(dtype), k.to(dtype)


def positions(layout: Layout) -> torch.Tensor:
    """Positions of the grid's tokens around its centre, in shares of its diagonal: float64 [tokens, dims]."""
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") - (n - 1) / 2 for n in layout.grid]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return where / max(1.0, sum((n - 1) ** 2 for n in layout.grid) ** 0.5)


@torch.no_grad()
def spread(call: Recorded) -> Spread:
    """Locality and entropy of dense attention, exactly and without a map.

    One call of attention whose values are (position, squared position, 1, k): E|x_i - x_j|^2 = |x_i|^2 m - 2 x_i . mean
    + second, and the entropy is LSE_i - scale q_i . (A k)_i.

    Args:
        call: The call.
    """
    check_recorded(call)
    (q, k), layout = wide(call), call.layout
    where = positions(layout).to(q)
    dims, inner = layout.dims, slice(layout.prefix, layout.prefix + layout.tokens)
    about = q.new_zeros(layout.length, dims + 2)
    about[inner] = torch.cat([where, where.square().sum(1, keepdim=True), torch.ones_like(where[:, :1])], 1)
    values = torch.cat([about[None, :, None].expand(*k.shape[:3], -1), k], 3)
    out, lse = attention(q, k, values, "dense", layout, scale=call.scale, key_mask=call.key_mask, return_lse=True)
    mean, second, mass = out[..., :dims], out[..., dims], out[..., dims + 1]
    own = where.square().sum(1)[:, None] * mass[:, inner]
    squared = own - 2 * (where[:, None] * mean[:, inner]).sum(-1) + second[:, inner]
    keys = torch.full((q.shape[0], 1, 1), float(layout.length), dtype=q.dtype, device=q.device)
    if call.key_mask is not None:
        keys = call.key_mask.sum(1).to(q.dtype)[:, None, None]
    nats = lse.to(q.dtype) - call.scale * (q * out[..., dims + 2 :]).sum(-1)
    entropy = nats.clamp(min=0) / keys.clamp(min=2).log()
    return Spread(mass, mean, second, squared, entropy, lse.to(q.dtype), layout)


@torch.no_grad()
def caught(call: Recorded, pattern: Pattern | str, lse: torch.Tensor | None = None) -> torch.Tensor:
    """Share of dense attention that a pattern catches, on the keys that it lists: exp(LSE of it - LSE of dense).

    Args:
        call: The call.
        pattern: A pattern that selects keys, or its text; of one with pooled rest only what it lists counts.
        lse: That of dense attention [B, S, H], if it is known.

    Returns:
        [B, S, H], from 0 to 1.

    Raises:
        ValueError: If the pattern does not fit, or is not softmax over some of the keys.
    """
    check_recorded(call)
    q, k = wide(call)
    options = {"scale": call.scale, "key_mask": call.key_mask}
    parsed = parse(pattern)
    if isinstance(parsed, PerHead):
        of_heads = parsed.of_heads(q.shape[2])
        found = {each: caught(call, each, lse) for each in dict.fromkeys(of_heads)}
        return torch.stack([found[each][..., head] for head, each in enumerate(of_heads)], -1)
    chosen = selecting(parsed, call.layout.grid)
    if lse is not None and list(tensor(lse, "lse", "[B, S, H]").shape) != list(q.shape[:3]):
        raise ValueError(f"lse {list(lse.shape)} must be {list(q.shape[:3])}: that of dense attention of this call")
    # Values are not asked for: the narrowest there are.
    v = k[..., :1]
    if lse is None:
        lse = attention(q, k, v, "dense", call.layout, **options, return_lse=True)[1]
    if isinstance(chosen, Dense):
        return torch.ones_like(lse)
    own = attention(q, k, v, chosen, call.layout, **options, return_lse=True)[1]
    return (own - lse).exp().clamp(max=1).nan_to_num(0.0)


def check_selecting(pattern: Pattern) -> None:
    """Raise a ValueError for a pattern that is not softmax over some of the keys, whatever the grid."""
    if not isinstance(pattern, ListedPattern) or pattern.needs_weights:
        raise ValueError(
            f"{pattern} is not softmax over some of the keys of each head, so it catches no share of dense attention: "
            "give patterns that select keys, like na(window=9x9) or topk(keep=0.2)"
        )


def selecting(pattern: Pattern, grid: tuple[int, ...]) -> Pattern:
    """The pattern whose log-sum-exp is over what a pattern lists, and nothing else.

    Raises:
        ValueError: If it is not softmax over some of the keys.
    """
    check_selecting(pattern)
    if isinstance(pattern, PooledPattern) and pattern.pool_shape(grid) is not None:
        raise ValueError(f"{pattern} appends pooled keys, which are no keys of dense attention: leave pool out")
    if isinstance(pattern, DynamicPattern) and (pattern.rest, pattern.every) != ("drop", 1):
        pattern = replace(pattern, rest="drop", every=1)  # type: ignore[type-var]
    pattern.check(grid)
    return pattern


def received(call: Recorded, weights: torch.Tensor) -> torch.Tensor:
    """Who is read: A^T g of dense attention, the heads added up, by backward calls with respect to the values.

    Args:
        call: The call.
        weights: g [B, R, S] for every head, or [B, R, H, S].

    Returns:
        [B, R, S], as many rows at a time as a head has channels.

    Raises:
        ValueError: If the weights do not fit the call.
    """
    check_recorded(call)
    q, k = wide(call)
    batch, length, heads, width = q.shape
    given = list(tensor(weights, "weights", "[B, R, S] or [B, R, H, S]").shape)
    if weights.ndim == 3:
        weights = weights[:, :, None].expand(-1, -1, heads, -1)
    if weights.ndim != 4 or (weights.shape[0], *weights.shape[2:]) != (batch, heads, length):
        raise ValueError(f"weights {given} must be [B, R, S] or [B, R, H, S] with B {batch}, H {heads} and S {length}")
    gradients, found = weights.to(q).permute(0, 3, 2, 1), []
    for part in gradients.split(width, 3):
        with torch.enable_grad():
            v = k.new_zeros(*k.shape[:3], part.shape[3]).requires_grad_()
            out = attention(q, k, v, "dense", call.layout, scale=call.scale, key_mask=call.key_mask)
        found.append(torch.autograd.grad(out, v, part)[0].sum(2))
    return torch.cat(found, 2).transpose(1, 2)
