"""Attention among merged tokens (`AgentSD`): what changes is the input of the projections, not only the attention.

The processor stays diffusers' own. It is handed the merged tokens with the agents behind them, projects both, and
calls attention; there queries of the agents are told from those of the tokens. So LoRA, fused projections and
whatever else a processor does around the attention keep working.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch

from visattn.kernels.agent.agent_sd import Matching, agent_sd, agents_pay, match
from visattn.layout import Layout
from visattn.patterns import AgentSD
from visattn.pipelines.patch import clones, numbering
from visattn.pipelines.patch.group import Group
from visattn.pipelines.patch.numbering import Lease
from visattn.problem import Problem
from visattn.runtime.call import AttentionCall
from visattn.runtime.verdict import Mode, Verdict
from visattn.steps import among_first


class Merged(NamedTuple):
    """Tokens that a processor is working on.

    Attributes:
        tokens: How many there are; agents follow them.
        layout: Where the tokens sat before they were merged.
    """

    tokens: int
    layout: Layout


class MergingGroup(Group):
    """A group whose modules merge tokens."""

    def around(self, attend: Callable[..., torch.Tensor], x: torch.Tensor, index: int, cross: bool) -> torch.Tensor:
        """Merge tokens, run a processor on them, and put its output back where the tokens came from.

        Args:
            attend: The processor as a function of tokens [B, n, C].
            x: All tokens [B, N, C].
            index: Number of the module, from 0.
            cross: Whether its keys are masked or another sequence.
        """
        here, pattern = self.run.here, self.pattern
        assert isinstance(pattern, AgentSD)
        layout, why = self._fits_tokens(x, cross)
        here.merged, here.kept = None, why
        if layout is None:
            return attend(x)
        forward = self.run.forward
        assert forward is not None
        early = pattern.stepped and among_first(pattern.early, f"early={pattern.early}", forward.step, forward.total)
        merge = pattern.merge(early or (not pattern.stepped and pattern.early != 0))
        cell = pattern.cells(merge)
        count = x.shape[1]
        free = count - (layout.grid[0] // cell[0]) * (layout.grid[1] // cell[1])
        away, agents_away = min(int(merge.tokens * count), free), min(int(merge.agents * count), free)
        pays = merge.agents > 0 and agents_pay(count, away, agents_away)
        matching: Matching | None = None
        tokens = x
        if away or pays:
            with self.run.tally.timed(self._name(), "sparse", x.device):
                matching = match(x, (layout.grid[0], layout.grid[1]), cell, self._generator(x, forward.step, index))
                tokens = matching.merge(x, away)
                kept = tokens.shape[1]
                if pays:
                    tokens = torch.cat([tokens, matching.merge(x, agents_away)], 1)
        else:
            kept = count
        here.merged = Merged(kept, layout)
        try:
            out = attend(tokens)
        finally:
            here.merged = None
        if matching is None:
            return out
        with self.run.tally.timed(self._name(), "sparse", x.device):
            return matching.unmerge(out[:, :kept], away)

    def attend(
        self,
        call: AttentionCall,
        site: str | None,
        parameters: Mapping[str, torch.Tensor] | None = None,
        key: Hashable = None,
        mode: Mode = "eager",
    ) -> tuple[torch.Tensor, tuple[Layout, ...]]:
        """Attention of the processor: of merged tokens q, k, v [B, n, H, D] with the agents behind them."""
        merged, name, (q, k, v) = self.run.here.merged, self._name(), call.tensors
        if merged is None:
            return self.leave(call, site, self.run.here.kept), ()
        n, pattern = merged.tokens, self.pattern
        assert isinstance(pattern, AgentSD)
        shape = q.shape[0], q.shape[2], k.shape[2], q.shape[3]
        verdict = Verdict("sparse", problems=(Problem(pattern, merged.layout, *shape, q.dtype, q.device.type),))
        cells = verdict.cells(self.run.tally, name, q.device)
        begun = self.run.tally.begin(cells[0])
        if q.shape[1] == n:
            out = self.stock(call)
        else:
            options = {"read_scale": pattern.read_scale, "shortcut": pattern.shortcut}
            out = agent_sd(q[:, :n], k[:, :n], v[:, :n], q[:, n:], **options)
            # Rows of the agents have no use, but the processor counts on them.
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - n))
        self.run.tally.end(cells, begun)
        self.note(self.run.forward, name, verdict)
        return out, ()

    def key(self, *call: Any) -> Hashable:
        """Every call is looked at: what runs depends on what was merged before it."""
        return None

    def _name(self) -> str:
        return self.run.site or self.unnamed

    def _fits_tokens(self, x: torch.Tensor, cross: bool) -> tuple[Layout | None, str]:
        """Layout of tokens that are to be merged; else why not ("" if it is to be dense)."""
        forward, pattern = self.run.forward, self.pattern
        assert isinstance(pattern, AgentSD)
        if forward is None:
            return None, "called outside of the model's forward"
        if forward.dense:
            return None, ""
        if cross or x.ndim != 3:
            return (
                None,
                "its keys are masked or another sequence" if cross else f"its input {list(x.shape)} is not [B, N, C]",
            )
        layouts = forward.layouts(x.shape[1])
        if isinstance(layouts, str):
            return None, layouts
        (layout,) = layouts
        full = forward.where.grid
        # As the original: how often its tokens were halved, from the root of the ratio of the counts.
        factor = math.ceil(math.sqrt(full[0] * full[1] // x.shape[1]))
        if factor > pattern.max_downsample:
            name = self._name()
            forward.reasons.setdefault(
                name,
                f"its grid is {factor} times smaller than the latents, beyond max_downsample={pattern.max_downsample}",
            )
            forward.excused.add(name)
            return None, ""
        cells = [pattern.cells(pattern.merge(early)) for early in (True, False)]
        small = [c for c in cells if c[0] > layout.grid[0] or c[1] > layout.grid[1]]
        if small:
            return (
                None,
                f"its {layout.grid[0]}x{layout.grid[1]} tokens are fewer than a cell of {small[0][0]}x{small[0][1]}",
            )
        return layout, ""

    def _generator(self, x: torch.Tensor, step: int | None, index: int) -> torch.Generator | None:
        """Draws the same at the same step and module; nothing is drawn for odd batches, as in the original."""
        assert isinstance(self.pattern, AgentSD)
        if x.shape[0] % 2:
            return None
        return torch.Generator().manual_seed((self.pattern.seed * 10_007 + (step or 0)) * 10_007 + index)


def clone(processor: Any, lease: Lease, place: clones.Place) -> Any:
    """A copy of a processor that merges tokens for a group; it shares weights with the original."""
    copy = clones.clone(processor, lease, place)
    object.__setattr__(copy, "__class__", _merging(type(copy), lease.number))
    return copy


@functools.lru_cache(maxsize=1024)
def _merging(kind: type, number: int) -> type:
    inner: Any = kind.__call__

    # How many tokens remain depends on the step and the grid: compiled code stops here.
    @functools.partial(torch.compiler.disable, reason="agentsd merges tokens, and how many depends on the step")
    @functools.wraps(inner)
    def call(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        group, place = numbering.look_up(number), self._visattn_place
        if group is None:
            return inner(self, attn, hidden_states, *args, **kwargs)
        # Merging counts too, before the processor says where it is.
        place.enter(attn)
        given = kwargs.get("encoder_hidden_states", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        return group.around(
            lambda tokens: inner(self, attn, tokens, *args, **kwargs),
            hidden_states,
            place.index,
            cross=given is not None or mask is not None,
        )

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
