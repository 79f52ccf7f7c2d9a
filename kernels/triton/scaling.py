"""How long a layer takes on several GPUs that are not there: the cost model of the kernels, and rates of links.

A layer is its attention and its matrix products, 24 hidden^2 operations a token (projections, and an MLP of four times
the hidden size); what else it does is not counted. Halo: own tiles beside the exchange, then the border. Ulysses:
nothing beside the exchanges. The rank in the middle, which has two borders, is the one that counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from visattn.kernels.triton.estimate import GPUS, estimate
from visattn.layout import Layout
from visattn.parallel import Slabs, best_axis, halo_needs
from visattn.parallel.needs import check
from visattn.patterns import Pattern, parse
from visattn.patterns.radial import Radial


@dataclass(frozen=True)
class Link:
    """What connects GPUs.

    Attributes:
        rate: GB/s that a GPU sends while it receives as much.
        fixed: Milliseconds of an exchange besides.
        basis: Where these come from.
    """

    rate: float
    fixed: float
    basis: str


MEASURED = "measured on two H200 with NCCL, torch 2.11 (docs/results/h200-x2-parallel.json)"
LINKS = {
    "nvlink": Link(334, 0.34, MEASURED),
    "pcie": Link(40, 0.34, "assumed: 40 of the 64 GB/s of PCIe 5.0 x16, the fixed time of NVLink"),
    "ib": Link(45, 0.34, "assumed: 45 of the 50 GB/s of one 400 Gb/s adapter for each GPU, the fixed time of NVLink"),
}
# GB/s at which what Ulysses exchanges is put in order and back, of the bytes that are sent, fixed times among it (same
# source).
PACK = 118.0
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Scaled:
    """A layer, or a step of several, on some GPUs.

    Attributes:
        gpus: How many.
        grid: Tokens per axis.
        milliseconds: Of all of it.
        attention: Of its attention, exchanges included.
        exposed: Of its exchanges, what nothing hides.
        sent: Bytes that a GPU sends.
        speedup: Against one GPU: on the same grid, or as much more work as there are GPUs.
        efficiency: Speedup by GPU.
    """

    gpus: int
    grid: tuple[int, ...]
    milliseconds: float
    attention: float
    exposed: float
    sent: int
    speedup: float = 1.0
    efficiency: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """Strong and weak scaling.

    Attributes:
        strong: The same grid on more and more GPUs.
        weak: A grid that grows with the GPUs along the axis that is cut.
        axis: That axis.
        assumed: What all of it rests on.
    """

    strong: tuple[Scaled, ...]
    weak: tuple[Scaled, ...]
    axis: int
    assumed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def scaling(
    pattern: Pattern | str,
    layout: Layout,
    gpus: int = 8,
    parallel: str = "halo",
    gpu: str = "h100",
    link: str = "nvlink",
    *,
    heads: int = 24,
    head_dim: int = 128,
    layers: int = 1,
) -> Scaling:
    """Estimate a layer, or a step of several, in bfloat16 on 1 to `gpus` GPUs.

    Args:
        pattern: A list of tiles, or its text.
        layout: The tokens.
        gpus: Most GPUs, 2 to 64.
        parallel: "halo" or "ulysses".
        gpu: One of `estimate.GPUS`.
        link: One of `LINKS`.
        heads: Query and key heads.
        head_dim: Channels per head.
        layers: Layers that times and bytes are of.

    Raises:
        ValueError: If any of these has no record, or the pattern cannot be cut.
    """
    pattern = parse(pattern)
    if link not in LINKS:
        raise ValueError(f"link {link!r} has no record: pass one of {', '.join(LINKS)}")
    if parallel not in ("halo", "ulysses"):
        raise ValueError(f"parallel {parallel!r} must be halo or ulysses")
    if not 2 <= gpus <= COUNTS[-1]:
        raise ValueError(f"{gpus} GPUs: pass 2 to {COUNTS[-1]}")
    axis = 0 if isinstance(pattern, Radial) else best_axis(layout, 2)
    if parallel == "halo":
        check(pattern, Slabs.even(layout, 2, axis))
    model = _Model(pattern, parallel, gpu, LINKS[link], heads, head_dim, axis, layers)
    most = heads if parallel == "ulysses" else layout.grid[axis]
    counts = [n for n in COUNTS if n <= gpus and n <= most]
    strong = [model.step(layout, n) for n in counts]
    weak = [model.weak(layout, n) for n in counts if parallel == "halo" or n <= heads]
    notes = (
        f"{gpu}: {GPUS[gpu].basis}",
        f"{link}: {LINKS[link].rate:g} GB/s and {LINKS[link].fixed:g} ms an exchange, {LINKS[link].basis}",
        "one link for all GPUs, however many; a layer is attention and 24 hidden^2 operations a token, nothing else",
        *(["weak scaling beyond 4 GPUs is that of 4: ranks in the middle are alike"] if parallel == "halo" else []),
    )
    return Scaling(tuple(_relative(strong, False)), tuple(_relative(weak, True)), axis, notes)


def _relative(found: list[Scaled], weak: bool) -> list[Scaled]:
    """With speedups against the first."""
    out = []
    for one in found:
        speedup = found[0].milliseconds / one.milliseconds * (one.gpus if weak else 1)
        out.append(dataclasses.replace(one, speedup=speedup, efficiency=speedup / one.gpus))
    return out


@dataclass(frozen=True)
class _Model:
    """Everything but the grid and the number of GPUs."""

    pattern: Pattern
    parallel: str
    gpu: str
    link: Link
    heads: int
    head_dim: int
    axis: int
    layers: int = 1

    def step(self, layout: Layout, gpus: int) -> Scaled:
        """The layers of a sequence on some GPUs."""
        hidden = self.heads * self.head_dim
        attention, exposed, sent = self._attention(layout, gpus)
        tokens = -(-layout.grid[self.axis] // gpus) * layout.tokens // layout.grid[self.axis]
        tokens += layout.prefix + layout.suffix
        products = 24.0 * hidden**2 * tokens / GPUS[self.gpu].dense / 1e9
        n = self.layers
        return Scaled(gpus, layout.grid, n * (attention + products), n * attention, n * exposed, n * sent)

    def weak(self, layout: Layout, gpus: int) -> Scaled:
        """The same of a grid that is as many times longer."""
        like = min(gpus, 4) if self.parallel == "halo" else gpus
        grids = [
            tuple(side * n if i == self.axis else side for i, side in enumerate(layout.grid)) for n in (like, gpus)
        ]
        found = self.step(Layout(grids[0], layout.prefix, layout.suffix), like)
        return dataclasses.replace(found, gpus=gpus, grid=grids[1])

    def _time(self, pattern: Pattern, layout: Layout, heads: int) -> float:
        return estimate(pattern, layout, self.gpu, heads=heads, head_dim=self.head_dim).milliseconds

    def _attention(self, layout: Layout, gpus: int) -> tuple[float, float, int]:
        """Milliseconds of attention, those of exchanges that nothing hides, and bytes sent."""
        if gpus == 1:
            return self._time(self.pattern, layout, self.heads), 0.0, 0
        channel = 2 * self.head_dim
        slabs = Slabs.even(layout, gpus, self.axis)
        if self.parallel == "ulysses":
            own = slabs.local(0).tokens
            sent = 4 * own * channel * (self.heads - -(-self.heads // gpus))
            exchange = sent / 1e6 / self.link.rate + sent / 1e6 / PACK
            return self._time(self.pattern, layout, -(-self.heads // gpus)) + exchange, exchange, sent
        needs = halo_needs(self.pattern, slabs, gpus // 2)
        sent = 2 * needs.given_tokens * channel * self.heads
        exchange = self.link.fixed + 2 * needs.fetched_tokens * channel * self.heads / 1e6 / self.link.rate
        own = self._time(needs.own, slabs.local(gpus // 2), self.heads)
        border = sum(self._time(each.part, each.layout, self.heads) for each in needs.borders)
        if slabs.dense:
            shared = slabs.dense * self.heads * 4 * (self.head_dim + 1) * (gpus - 1)
            sent, border = sent + shared, border + self.link.fixed + shared / 1e6 / self.link.rate
        exposed = max(0.0, exchange - own)
        return own + exposed + border, exposed, sent
