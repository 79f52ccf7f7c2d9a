"""Patterns that list key blocks by what is in them: for every sample, head and block of queries."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from visattn.layout import Layout
from visattn.patterns.choice.alike import alike_blocks
from visattn.patterns.choice.always import always_mask, terms_of
from visattn.patterns.choice.blocks import (
    Blocks,
    block_of_rows,
    block_sizes,
    blocks_of,
    divides,
    fitting,
    inner,
    spread,
    token_blocks,
)
from visattn.patterns.choice.causal import check_causal, reachable, seen_tokens
from visattn.patterns.choice.guards import checked_together
from visattn.patterns.choice.listening import choosing, tell
from visattn.patterns.choice.marking import joined_heads, marked_for
from visattn.patterns.choice.memory import Means, kept_for
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.quick import by_kernels, quick_means
from visattn.patterns.choice.rest import Pooled, append_means, rest_weights
from visattn.patterns.choice.scores import Score, block_scores
from visattn.patterns.choice.skipping import not_skipped, refuse_gradients
from visattn.patterns.choice.slices import Slices
from visattn.patterns.choice.tail import TAILS
from visattn.patterns.geometry import Bools
from visattn.patterns.kinds import Tiled
from visattn.patterns.routes import Routes, lists_of
from visattn.patterns.tailed import TailedPattern, held_for
from visattn.patterns.values import LARGEST, PerAxis, drift_of, flags, uniform, whole_number
from visattn.tiling import Tiling

PER = ("row", "head", "all")
RESTS = ("drop", "mean", *TAILS)


class DynamicPattern(TailedPattern):
    """A pattern whose heads each list key blocks for each query block, by scores of pairs of blocks.

    Dense tokens are always listed, never scored and in no budget. What a key mask hides is in no mean, and its blocks
    come last. Means and scores are float32 at least; of equal scores the lower index wins. The choice is not
    differentiated.

    Attributes:
        score: Text of the rule for scores, see `choice.scores.Score`.
        always: Text of what is listed whatever its score, see `choice.always`, or None.
        per: Who has a budget: each "row" of blocks, each "head" over all its rows, or "all" heads of a sample together.
        share: Neighbouring heads that share one choice, by the mean of their scores: a number, or "all".
        rest: What unlisted blocks give: "drop" for nothing, "mean" for one pooled key each, "slope" for that and how it
            changes; "linear" and "coarse" add what is learned to the output.
        block: Sides of a block, or tokens of a run of the flat sequence; None for a cube-like box of 64 tokens.
        key_block: The same for blocks of keys, None for `block`.
        every: Denoising steps that lists are kept for: 1 chooses in each.
        drift: How far the means of blocks of queries or keys may move before lists are chosen again all the same,
            relative to their norm.
        alike: Blocks whose tokens are less alike than this list everything, or are listed by everyone; None for no such
            guard.
        skip: Listed blocks whose largest weight is below this share of the largest so far are passed over; 0 for none.
        causal: Whether a query sees no key after itself, on each axis; true alone is on all, or along the runs of the
            flat sequence.
    """

    score: str
    always: str | None
    per: str
    rest: str
    block: PerAxis | None
    key_block: PerAxis | None
    every: int
    drift: float
    share: int | str
    alike: float | None = None
    skip: float = 0.0
    causal: bool | tuple[bool, ...] = False

    def put_in_form(self) -> None:
        """Check the parameters that all dynamic patterns have, and give them the form that equal patterns share."""
        Score.of(self.score)
        always = "+".join(str(term) for term in terms_of(self.always)) or None
        object.__setattr__(self, "always", always)
        for name, value, known in (("per", self.per, PER), ("rest", self.rest, RESTS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be {', '.join(known[:-1])} or {known[-1]}")
        for name in ("block", "key_block"):
            object.__setattr__(self, name, block_sizes(getattr(self, name), name))
        if self.key_block is not None and self.block is None:
            raise ValueError(f"key_block={self.key_block!r} needs the block of queries too: give block")
        if self.key_block == self.block:
            object.__setattr__(self, "key_block", None)
        if self.share != "all" and (
            not isinstance(self.share, int) or isinstance(self.share, bool) or not 1 <= self.share <= LARGEST
        ):
            raise ValueError(f"share={self.share!r} must be a number of heads that choose together like 2, or all")
        object.__setattr__(self, "causal", uniform(flags(self.causal, "causal")))
        for name, value in checked_together(self).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "every", whole_number(self.every, "every", 1, "it counts steps"))
        object.__setattr__(self, "drift", drift_of(self.drift))

    @abstractmethod
    def most_listed(self, blocks: Blocks) -> int:
        """Key blocks that a query block lists at most, what is forced included."""

    @abstractmethod
    def expected(self, blocks: Blocks) -> float:
        """Share of the key blocks that a query block lists on average, for estimates."""

    @abstractmethod
    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which key blocks are listed, what is forced included: bool [B, h, rows, columns], like the scores.

        Args:
            scores: Of some heads; with a budget of all heads these are the rows of one.
            seen: Which blocks take part.
            forced: What is listed whatever its score: bool [rows, columns], or for each sample [B, 1, rows, columns].
            blocks: The blocks of one head.
            variance: What `variance` gave for these heads.
        """

    def variance(
        self, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        """A variance of the scores of each row that they do not tell themselves: [B, H, rows, 1]; None for none."""
        return None

    def blocks(self, grid: tuple[int, ...]) -> Blocks:
        """The blocks of a grid."""
        return blocks_of(grid, self.block, self.key_block, self.causal)

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if blocks or rules do not fit the grid."""
        blocks = self.blocks(grid)
        check_causal(blocks)
        Score.of(self.score).check(blocks)
        if self.most_listed(blocks) >= blocks.columns:
            return
        forced = int(self.forced(blocks).sum(1).max(initial=0))
        if forced > self.most_listed(blocks):
            raise ValueError(
                f"{self} on grid {grid}: always={self.always} lists up to {forced} of {blocks.columns} key blocks, "
                f"more than the {self.most_listed(blocks)} that it may list at most: allow more, or force fewer"
            )

    def forced(self, blocks: Blocks) -> Bools:
        """What `always` lists of what may be seen: bool [rows, columns]."""
        return always_mask(terms_of(self.always), blocks) & reachable(blocks)

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every block is listed whatever q and k are."""
        blocks = self.blocks(grid)
        if self.skip or self.learnable or any(blocks.causal):
            return False
        return self.least_listed(blocks) >= blocks.columns or bool(self.forced(blocks).all())

    @abstractmethod
    def least_listed(self, blocks: Blocks) -> int:
        """Key blocks that a query block lists at least."""

    def tiled_layout(self, layout: Layout) -> Layout:
        """The flat sequence where blocks are runs of it."""
        return Layout(self.blocks(layout.grid).grid, layout.prefix, layout.suffix)

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """The block of keys where it is small enough, else a part of it."""
        blocks = self.blocks(grid)
        box = tuple(math.gcd(a, b) for a, b in zip(blocks.queries, blocks.keys, strict=True))
        return fitting(box, blocks.grid, volume)

    def side_tile(self, grid: tuple[int, ...], volume: int, keys: bool) -> tuple[int, ...]:
        """The block of that side where it is small enough, else a part of it."""
        blocks = self.blocks(grid)
        return fitting(blocks.keys if keys else blocks.queries, blocks.grid, volume)

    def check_tiles(self, grid: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        """Raise a ValueError if a tile crosses the border of a block."""
        blocks = self.blocks(grid)
        for name, tile, box in (("query", queries, blocks.queries), ("key", keys, blocks.keys)):
            if not divides(tile, box, blocks.grid):
                raise ValueError(
                    f"{name} tiles {tile} cross the borders of the blocks {box} that {self} lists: give sides that "
                    "divide the block's"
                )

    def visible_pairs(self, grid: tuple[int, ...]) -> int:
        """What is expected to be listed."""
        return round(math.prod(grid) ** 2 * self._expected_of(self.blocks(grid)))

    def _expected_of(self, blocks: Blocks) -> float:
        """Share of all pairs of blocks that is listed on average: `expected`, of as many as a row may see."""
        share = self.expected(blocks)
        if not any(blocks.causal):
            return share
        return float(reachable(blocks).sum(1).clip(max=share * blocks.columns).mean()) / blocks.columns

    def routed_tiles(self, grid: tuple[int, ...], keys: Tiling) -> int:
        """What is expected to be listed."""
        return max(1, math.ceil(self._expected_of(self.blocks(grid)) * keys.runs[1]))

    @property
    def estimated(self) -> str:
        """Where the choice is known in number or not at all."""
        return "which blocks are listed depends on q and k, head by head; how many does not"

    @property
    def joins_heads(self) -> bool:
        """Whether heads share a choice or a budget."""
        return self.share != 1 or self.per == "all"

    @property
    def needs_steps(self) -> bool:
        """Whether lists are kept from step to step."""
        return self.every > 1

    @property
    def pools_rest(self) -> bool:
        """Whether unlisted blocks give a pooled key."""
        return TAILS.get(self.rest, self.rest) == "mean"

    def choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """The key blocks of each query block of each head: [B, H, query blocks, n] counted from the first block.

        int32 where kernels choose, else int64.

        Arguments as in `RoutedPattern.route`.
        """
        held = held_for(self)
        if held is not None:
            return held
        blocks = self.blocks(layout.grid)
        choice = self._listed(q, k, layout, blocks, key_mask, scale)
        if not self.skip:
            tell(choice, blocks)
            return choice
        with torch.no_grad(), choosing():
            factor = q.shape[3] ** -0.5 if scale is None else scale
            left = not_skipped(choice, q, k, layout, blocks, key_mask, factor, self.skip)
            tell(left, blocks, choice)
        return left

    def listed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """What `choose` gives before `skip` passes over some of it; nobody is told."""
        return self._listed(q, k, layout, self.blocks(layout.grid), key_mask, scale)

    def _listed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        blocks: Blocks,
        key_mask: torch.Tensor | None,
        scale: float | None,
    ) -> Routes:
        """The same for blocks that are known."""
        if self.skip:
            refuse_gradients(self, q, k)
        at = inner(layout)
        with torch.no_grad(), choosing():
            own = q[:, at], k[:, at]
            valid = None if key_mask is None else key_mask[:, at]
            factor = q.shape[3] ** -0.5 if scale is None else scale
            if self.every == 1:
                return self._chosen(*own, blocks, valid, factor)
            call = self, layout, q.shape, k.shape, q.device, factor, key_mask is None
            return kept_for(
                self.every,
                self.drift,
                call,
                blocks.columns,
                q.dtype,
                lambda: Means(*(quick_means(x, *side, valid) for x, side in zip(own, blocks.sides, strict=True))),
                lambda: self._chosen(*own, blocks, valid, factor),
            )

    def _chosen(
        self, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
    ) -> Routes:
        """What grid queries and keys [B, tokens, heads, D] choose, whatever was chosen before: by kernels or torch."""
        return by_kernels(self, q, k, blocks, valid, scale) or self.chosen_by_torch(q, k, blocks, valid, scale)

    def chosen_by_torch(
        self, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
    ) -> Routes:
        """The same by torch's operators, for any score and rule, device and dtype."""
        heads, share = q.shape[2], self._shared(q.shape[2])
        guard = None if self.alike is None else alike_blocks(q, k, blocks, valid, self.alike)
        slices, leaves = Slices(share, self.per == "all"), self.most_listed(blocks)
        seen, some = block_scores(Score.of(self.score), q, k, blocks, valid, scale, slices, leaves)
        variance = self.variance(q, k, blocks, valid, scale)
        found = []
        # No scores of all heads at a time: only the lists are kept.
        for scores, which in some:
            own = None if variance is None else variance[:, which]
            mask = marked_for(self, scores, which, seen, blocks, guard, share, own)
            found.append(lists_of(mask, blocks.columns if guard else leaves))
        return joined_heads(self, found, blocks, heads, share)

    def pick(self, scores: torch.Tensor, seen: Seen, blocks: Blocks) -> Routes:
        """What scores of all heads [B, H, rows, columns] choose, whoever made them; who listens is told."""
        choice = self.picked(scores, seen, blocks)
        tell(choice, blocks)
        return choice

    def picked(self, scores: torch.Tensor, seen: Seen, blocks: Blocks) -> Routes:
        """The same where others tell what is seen."""
        heads = scores.shape[1]
        share = self._shared(heads)
        mask = marked_for(self, scores, slice(0, heads), seen, blocks, None, share, None)
        return joined_heads(self, [lists_of(mask, self.most_listed(blocks))], blocks, heads, share)

    def _shared(self, heads: int) -> int:
        """Heads that share one choice."""
        share = heads if self.share == "all" else self.share
        assert isinstance(share, int)
        if heads % share:
            raise ValueError(f"{self}: {heads} heads cannot be shared by {share}: give a divisor of {heads}, or all")
        return share

    def route(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        plan: Tiled,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """The key tiles of the blocks that each query tile's block lists, one list per query head."""
        return self.spread(self.choose(q, k, plan.layout, key_mask, scale), plan)

    def spread(self, choice: Routes, plan: Tiled) -> Routes:
        """What `choose` gave as lists of the key tiles of a plan."""
        return spread(choice, plan, self.blocks(plan.layout.grid))

    def rest_weights(self, pooled: Pooled, choice: Routes, plan: Tiled) -> torch.Tensor:
        """What is added to the scores of the pooled keys, -inf for those not seen: [B, H, grid query tiles, blocks]."""
        rows = block_of_rows(plan, self.blocks(plan.layout.grid), choice.tiles.device)
        found = rest_weights(pooled.weight, choice)
        return found if rows is None else found[:, :, rows]

    def pooled(self, k: torch.Tensor, v: torch.Tensor, layout: Layout, key_mask: torch.Tensor | None) -> Pooled:
        """Keys and values with the means of all blocks behind them, for `rest=mean`."""
        return append_means(k, v, layout, self.blocks(layout.grid), key_mask)

    def routed_grid_mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Every token of a block sees the tokens of the blocks that it lists: bool [B, H, tokens, tokens].

        All of them, but for those after itself on causal axes.
        """
        return self.token_mask(self.choose(q, k, layout, key_mask, scale), layout)

    def token_mask(self, choice: Routes, layout: Layout, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """What tokens of the grid see where their blocks list these: bool [B, G, tokens, grid tokens].

        Args:
            choice: What `choose` gave.
            layout: The tokens.
            tokens: Of the grid, counted from its first one; None for all.
        """
        blocks, device = self.blocks(layout.grid), choice.tiles.device
        rows, columns = (token_blocks(blocks.grid, box, device) for box in (blocks.queries, blocks.keys))
        listed = choice.mask(0, blocks.columns)[:, :, rows if tokens is None else rows[tokens]][..., columns]
        seen = seen_tokens(blocks, device, tokens)
        return listed if seen is None else listed & seen
