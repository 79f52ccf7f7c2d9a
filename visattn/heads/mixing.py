"""Layers with other heads than those they are made of: each new head is a sum of old ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from visattn.heads.sites import Site


def head_norms(site: Site) -> torch.Tensor:
    """Frobenius norm of each head's product of value and output projection, text's included: float64 [H]."""
    total = torch.zeros(site.heads, dtype=torch.float64, device="cpu")
    for stream in site.streams:
        assert stream.out is not None
        value = (stream.v or stream.q).layer.weight.detach().cpu().double()[-site.heads * site.head_dim :]
        value = value.unflatten(0, (site.heads, -1))
        out = stream.out.layer.weight.detach().cpu().double()[:, : site.heads * site.head_dim]
        out = out.unflatten(1, (site.heads, -1)).transpose(0, 1)
        # trace(out^T out value value^T), in products of a head's channels.
        total += ((out.transpose(1, 2) @ out) * (value @ value.transpose(1, 2))).sum((1, 2))
    return total.sqrt()


def _like(layer: nn.Linear, sides: tuple[int, int]) -> nn.Linear:
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    return nn.Linear(*sides, bias=layer.bias is not None, **options)


def _filled(new: Any, old: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A new layer with values, in the state of the old one."""
    with torch.no_grad():
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                getattr(new, name).copy_(value)
                getattr(new, name).requires_grad_(getattr(old, name).requires_grad)
    return new.train(old.training)


def rows(layer: nn.Linear, mix: torch.Tensor, dim: int, new: nn.Linear | None = None) -> Any:
    """A layer whose output has other heads: [new, old] of them."""

    def mixed(x: torch.Tensor) -> torch.Tensor:
        wide = x.detach().double().unflatten(0, (-1, dim))
        return torch.einsum("no,o...->n...", mix.to(x.device), wide).flatten(0, 1)

    new = new if new is not None else _like(layer, (layer.in_features, len(mix) * dim))
    return _filled(new, layer, mixed(layer.weight), None if layer.bias is None else mixed(layer.bias))


def columns(layer: nn.Linear, mix: torch.Tensor, dim: int) -> Any:
    """A layer of whose input the first channels are heads: [new, old] of them, added up."""
    inner = mix.shape[1] * dim
    weight = layer.weight.detach().double()
    heads = torch.einsum("no,xod->xnd", mix.to(weight.device), weight[:, :inner].unflatten(1, (-1, dim))).flatten(1)
    new = _like(layer, (layer.in_features - inner + len(mix) * dim, layer.out_features))
    return _filled(new, layer, torch.cat([heads, weight[:, inner:]], 1), layer.bias)


def channels(norm: Any, mix: torch.Tensor, dim: int) -> Any:
    """A norm over the channels of all heads: [new, old] of them."""
    new = copy.deepcopy(norm)
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is not None:
            wide = value.detach().double().unflatten(0, (-1, dim))
            made = torch.einsum("no,od->nd", mix.to(wide.device), wide).flatten().to(value.dtype)
            setattr(new, name, nn.Parameter(made, requires_grad=value.requires_grad))
    channels = len(mix) * dim
    for name in ("normalized_shape", "dim"):
        shape = getattr(new, name, None)
        if shape is not None:
            setattr(new, name, channels if isinstance(shape, int) else type(shape)((channels,)))
    return new
