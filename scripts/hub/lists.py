"""States a pattern on a grid as the lists that the kernel of the hub walks."""

from __future__ import annotations

import torch

from scripts.hub.attention import Lists, Plan
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.backend import architecture
from visattn.kernels.triton.config import Config, config
from visattn.kernels.triton.lists.program import program
from visattn.layout import Layout
from visattn.patterns import ListedPattern, parse


def make_plan(pattern: str, layout: Layout, dtype: torch.dtype, head_dim: int, device: torch.device) -> Plan:
    """The lists of a pattern for tensors of a dtype and head dim on a device.

    Raises:
        ValueError: If the pattern is not a list of key tiles, or has extra columns.
    """
    found = parse(pattern)
    if not isinstance(found, ListedPattern):
        raise ValueError(
            f"{found} is not a list of key tiles: use na(window=...), halo(...), clear(...) or radial(...)"
        )
    number = architecture(device)
    sides = {d: config(number, dtype, head_dim, d) for d in ("forward", "key_grad", "query_grad")}
    return Plan(**{direction: _lists(found, layout, direction, own, device) for direction, own in sides.items()})


def _lists(pattern: ListedPattern, layout: Layout, direction: str, own: Config, device: torch.device) -> Lists:
    run = program(plan_of(pattern, layout, direction, own), direction == "key_grad", own.per_step, device)
    if run.extra:
        raise ValueError(f"{pattern} adds {run.extra} pooled keys, which the kernel of the hub does not take")
    same = ("tokens", "bounds", "bases", "mask_ids", "offsets", "masks", "rows", "columns", "tiles", "dense_rows")
    return Lists(
        **{name: getattr(run, name) for name in (*same, "full", "partial", "reach")},
        prefix_tiles=run.dense_columns[0],
        suffix_tiles=run.dense_columns[1],
        prefix=layout.prefix,
        suffix_start=layout.prefix + layout.tokens,
        suffix=layout.suffix,
        warps=own.warps,
        stages=own.stages,
    )
