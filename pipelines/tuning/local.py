"""What candidates do inside layers: a watcher that runs each of them on what attention got in a dense run."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from visattn.attend import attention
from visattn.layout import Layout
from visattn.patterns.choice.memory import Place, placed
from visattn.timing import per_call
from visattn.tuning.subject import DENSE, Local
from visattn.watch import Watched

# Measurements of a candidate's time.
TURNS = 3
# Samples whose error is measured; times are of all.
SAMPLES = 4


class Probe:
    """Runs every candidate on the calls of one step, one call at a time, so that nothing is kept but numbers.

    Attributes:
        found: Errors and times of candidates, by site; those of several calls of a site are means.
    """

    def __init__(
        self, candidates: Sequence[str], step: int, weight_of: Callable[[str, int], torch.Tensor | None]
    ) -> None:
        """Watch.

        Args:
            candidates: Texts of patterns.
            step: The denoising step.
            weight_of: Output projection of a site with so many channels.
        """
        self._candidates, self._step, self._weight_of = tuple(candidates), step, weight_of
        self._seen: dict[str, dict[str, list[Local]]] = {}
        self._failed: set[str] = set()

    def __call__(self, watched: Watched) -> None:
        """Run the candidates on a call of the step."""
        if watched.step != self._step or len(watched.layouts) > 1:
            return
        weight = self._weight_of(watched.site, watched.v.shape[2] * watched.v.shape[3])
        dense = _projected(watched.out[:SAMPLES], weight)
        size = dense.square().sum()
        here = self._seen.setdefault(watched.site, {})
        for name in self._candidates:
            local = self._try(watched, name, dense, size, weight)
            if local is not None:
                here.setdefault(name, []).append(local)

    def _try(
        self, watched: Watched, name: str, dense: torch.Tensor, size: torch.Tensor, weight: torch.Tensor | None
    ) -> Local | None:
        layout: Layout = watched.layouts[0]

        def run() -> torch.Tensor:
            # Without a memory: each call chooses, as the first of those that share a choice does.
            with placed(Place(None)):
                return attention(
                    watched.q,
                    watched.k,
                    watched.v,
                    name,
                    layout,
                    scale=watched.scale,
                    key_mask=watched.key_mask,
                )

        try:
            out = run()
        except Exception as error:
            # Not for this grid, not beside a mask, or a kernel that fails to compile in ways of its own.
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(f"candidate {name} is left out at {watched.site}: {error}", stacklevel=2)
            return None
        error = 0.0
        if name != DENSE:
            error = float((_projected(out[:SAMPLES], weight) - dense).square().sum() / size)
        # On a GPU one call behind the other, as in a model.
        calls = 4 if watched.q.device.type == "cuda" else 1
        seconds = statistics.median(per_call(run, calls) for _ in range(TURNS))
        return Local(error, seconds)

    @property
    def found(self) -> Mapping[str, Mapping[str, Local]]:
        """Means over the calls of each site; candidates that did not run on all of them are left out."""
        result = {}
        for site, here in self._seen.items():
            most = max(len(values) for values in here.values())
            result[site] = {
                name: Local(statistics.fmean(v.error for v in values), sum(v.seconds for v in values))
                for name, values in here.items()
                if len(values) == most
            }
        return result


def _projected(out: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Attention [B, S, H, D] behind the output projection, in float32."""
    flat = out.flatten(2).float()
    return flat if weight is None else flat @ weight.to(flat.device, torch.float32).T
