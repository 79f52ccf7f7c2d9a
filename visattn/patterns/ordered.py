"""Patterns in the order of the content: tokens that are alike become neighbours, and then tiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from visattn.layout import Layout
from visattn.patterns.choice.blocks import Blocks, inner
from visattn.patterns.choice.picks import Seen
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis


class Clustered(NamedTuple):
    """Which grid tokens belong together, and which groups see each other.

    Attributes:
        queries: Group of each query: int64 [B, H, tokens].
        keys: Group of each key, per query head: int64 [B, H, tokens].
        listed: Which groups of keys each group of queries sees: bool [B, H, query groups, key groups].
        extra: Keys of the grid that all queries of a head see once more, int64 [B, H, m]; None for none.
        weight: What is added to their scores, -inf for those that are not valid: [B, H, m].
        copied: The grid token whose output each query has, int64 [B, H, tokens]; None for its own.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    listed: torch.Tensor
    extra: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    copied: torch.Tensor | None = None


class OrderedPattern(ComposedPattern):
    """A pattern of groups of tokens that q and k make: attention is that of all tokens of the groups that are listed.

    Dense tokens are in no group, see everything and are seen by everybody. The backend "ordered" sorts the tokens of
    each head by their group and runs the lists of tiles that come out, "reference" takes the mask.
    """

    @abstractmethod
    def cluster(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Clustered:
        """The groups of q [B, S, H, D] and k [B, S, Hkv, D], without gradients; padding decides nothing."""

    @abstractmethod
    def tiles(self, layout: Layout) -> tuple[int, int]:
        """Tokens of a tile of queries and of keys in the order of the groups."""

    @abstractmethod
    def groups(self, layout: Layout) -> tuple[int, int]:
        """Groups of queries and of keys."""

    @abstractmethod
    def expected(self, layout: Layout) -> float:
        """Share of the grid's pairs that is seen, for estimates."""

    def more_keys(self, layout: Layout) -> int:
        """Keys of the grid that all queries of a head see once more, for estimates."""
        return 0

    def passes(self) -> int:
        """How often all tokens are held against all groups in a call that follows another, for estimates."""
        return 0

    def token_mask(self, found: Clustered, layout: Layout) -> torch.Tensor:
        """Visibility of all tokens to each other, without the extra keys: bool [B, H, S, S].

        A query that has the output of another sees what that one sees.
        """
        queries = found.queries if found.copied is None else found.queries.gather(2, found.copied)
        rows = found.listed.gather(2, queries[..., None].expand(-1, -1, -1, found.listed.shape[3]))
        grid = rows.gather(3, found.keys[:, :, None].expand(-1, -1, rows.shape[2], -1))
        mask = torch.ones(*grid.shape[:2], layout.length, layout.length, dtype=torch.bool, device=grid.device)
        at = inner(layout)
        mask[:, :, at, at] = grid
        return mask

    def instead(self, grid: tuple[int, ...]) -> str:
        """Lists of tokens."""
        return "lists of tokens in an order that q and k make, so that no tile of the grid is listed"


# The lists of the call that runs: the patterns that carry them are found again by their numbers alone.
_lists: ContextVar[Routes | None] = ContextVar("lists", default=None)


@contextmanager
def carrying(pattern: Carried, routes: Routes) -> Iterator[None]:
    """Inside, patterns that carry lists have these; what takes derivatives of the call later has them too."""
    object.__setattr__(pattern, "routes", routes)
    before = _lists.set(routes)
    try:
        yield
    finally:
        _lists.reset(before)


@dataclass(frozen=True)
class Carried(DynamicPattern):
    """Lists of runs of a sequence that somebody else has made, see `carrying`; no pattern of its own.

    Attributes:
        block: Tokens of a run of queries.
        key_block: Tokens of a run of keys.
        most: Runs of keys that a run of queries lists at most.
        share: Share of them that it lists on average, for estimates.
    """

    block: PerAxis | None = 64
    key_block: PerAxis | None = 64
    most: int = 1
    part: float = 0.1

    score: ClassVar[str] = "mean"
    always: ClassVar[str | None] = None
    per: ClassVar[str] = "row"
    rest: ClassVar[str] = "drop"
    every: ClassVar[int] = 1
    drift: ClassVar[float] = 0.3
    share: ClassVar[int | str] = 1
    name: ClassVar[str] = "carried"
    # Its own lists, for second derivatives, which come after the call: no parameter that could tell patterns apart.
    routes: ClassVar[Routes | None] = None

    def most_listed(self, blocks: Blocks) -> int:
        """`most`."""
        return min(self.most, blocks.columns)

    def least_listed(self, blocks: Blocks) -> int:
        """Any number."""
        return 0

    def expected(self, blocks: Blocks) -> float:
        """`part`."""
        return self.part

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Never: who carries lists wants them run."""
        return False

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Nothing: there are no scores."""
        raise AssertionError("lists are carried, not chosen")

    def choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """The lists that are carried."""
        routes = _lists.get() or self.routes
        assert routes is not None, "nobody carries lists"
        return routes
