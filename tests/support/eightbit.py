"""Attention in 8 bits in float64, query by query: what the kernels and the simulation round, written out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# A step: for each of its tiles all of its tokens, and those of them that the query sees.
Step = list[tuple[list[int], list[int]]]


def e4m3(x: float) -> float:
    """The nearest float of 4 bits of exponent and 3 of mantissa, ties to even."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -6)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(x / step) * step))


def _as_int8(row: torch.Tensor, scale: float) -> torch.Tensor:
    return (row / scale).round()


def _scale(x: torch.Tensor, top: float) -> float:
    return float(x.abs().max()) / top or 1.0 / top


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    steps: Sequence[Sequence[Step]],
    scale: float,
    precision: str,
    summed: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [S, H, D] and log-sum-exp [S, H] of one sample.

    Args:
        q: Queries [S, H, D], float64.
        k: Keys [N, Hkv, D].
        v: Values [N, Hkv, D].
        steps: Of each query.
        scale: Factor on the logits.
        precision: "int8" or "fp8".
        summed: Keys whose mean is taken from all.
    """
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=q.dtype)
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        shift = keys[list(summed)].mean(0)
        middle = (values.amax(0) + values.amin(0)) / 2 if precision == "int8" else values.mean(0)
        keys, values = keys - shift, values - middle
        unit = values.abs().amax(0) / (127.0 if precision == "int8" else 448.0)
        unit = torch.where(unit > 0, unit, 1.0)
        small = (values / unit).round() if precision == "int8" else _each_e4m3(values / unit)
        for i, own in enumerate(steps):
            found = _one(q[i, head], keys, small, own, scale, precision)
            if found is not None:
                out[i, head] = found[0] * unit + middle
                lse[i, head] = found[1] + scale * float(q[i, head] @ shift)
    return out, lse


def _each_e4m3(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[e4m3(float(n)) for n in row] for row in x], dtype=x.dtype)


def _one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, steps: Sequence[Step], scale: float, precision: str
) -> tuple[torch.Tensor, float] | None:
    """Output of one query without unit and middle, and its log-sum-exp; None if it sees no key."""
    q_scale = _scale(query, 127.0)
    q8 = _as_int8(query, q_scale)
    logits: list[list[tuple[float, int]]] = []
    for step in steps:
        logits.append([])
        for tokens, seen in step:
            k_scale = _scale(keys[tokens], 127.0)
            products = _as_int8(keys[seen], k_scale) @ q8
            logits[-1] += [(float(p) * q_scale * k_scale * scale, j) for p, j in zip(products, seen, strict=True)]
    every = [each for step in logits for each, _ in step]
    if not every:
        return None
    level, top = max(every), 127.0 if precision == "int8" else 256.0
    total, out = 0.0, torch.zeros_like(query)
    for step in filter(None, logits):
        largest = max(each for each, _ in step)
        for each, j in step:
            weight = top * math.exp(each - largest)
            rounded = float(round(weight)) if precision == "int8" else e4m3(weight)
            weight = rounded / top * math.exp(largest - level)
            # The general kernel for fp8 adds up weights before they are rounded, as Hopper's does.
            total += weight if precision == "int8" else math.exp(each - level)
            out += weight * values[j]
    return out / total, level + math.log(total)


def steps_of_walk(walk: object, mask: torch.Tensor, per_step: int) -> list[list[Step]]:
    """The steps of the simulation's `Walk`, of each query."""
    found: dict[int, list[Step]] = {}
    for rows, tiles in zip(walk.rows, walk.tiles, strict=True):  # type: ignore[attr-defined]
        held = [[int(t) for t in walk.tokens[tile] if t >= 0] for tile in tiles]  # type: ignore[attr-defined]
        for query in rows.tolist():
            own = [(tokens, [t for t in tokens if mask[query, t]]) for tokens in held if tokens]
            found[query] = [own[at : at + per_step] for at in range(0, len(own), per_step)]
    return [found[i] for i in range(len(found))]


def steps_of_program(run: object, mask: torch.Tensor) -> list[list[Step]]:
    """The steps of a kernel's `Program`, of each query: its list, then the runs of dense keys."""
    found: dict[int, list[Step]] = {}
    columns = run.column_tiling  # type: ignore[attr-defined]
    grid = {int(tokens[0]): [int(t) for t in tokens if t >= 0] for tokens in columns.tokens[columns.grid_tiles]}
    for tokens, (start, _, stop, dense) in zip(run.tokens, run.bounds.tolist(), strict=True):  # type: ignore[attr-defined]
        listed = [grid[first] for first in run.bases[start:stop].tolist()]  # type: ignore[attr-defined]
        runs = list(_runs(run))[:dense]
        for query in tokens[tokens >= 0].tolist():
            # A list is filled up by repeating a tile that nobody sees a second time.
            once: set[int] = set()
            steps = []
            for at in range(0, len(listed), run.tiles):  # type: ignore[attr-defined]
                step = []
                for tile in listed[at : at + run.tiles]:  # type: ignore[attr-defined]
                    step.append((tile, [t for t in tile if mask[query, t] and tile[0] not in once]))
                    once.add(tile[0])
                steps.append(step)
            steps += [[(t, [j for j in t if mask[query, j]]) for t in step] for step in runs]
            found[query] = steps
    return [found[i] for i in range(len(found))]


def _runs(run: object) -> Iterator[list[list[int]]]:
    """The tiles of each step over dense keys."""
    layout, slots = run.column_tiling.layout, run.columns // run.tiles  # type: ignore[attr-defined]
    suffix = layout.prefix + layout.tokens
    more = run.column_tiling.extra  # type: ignore[attr-defined]
    for first, count in ((0, layout.prefix), (suffix, layout.suffix), (layout.length, more)):
        for at in range(0, count, run.columns):  # type: ignore[attr-defined]
            tokens = list(range(first + at, first + min(at + run.columns, count)))  # type: ignore[attr-defined]
            cut = [tokens[i : i + slots] for i in range(0, len(tokens), slots)]
            yield cut
