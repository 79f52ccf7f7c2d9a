"""Where the tokens of a forward sit, for models whose sequences have one layout, or one for each sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

from visattn.layout import Layout


@dataclass(frozen=True)
class Samples:
    """Where the tokens of one forward sit, see `visattn.runtime.forward.Where`.

    Attributes:
        each: The layout of every sample, or the one of all.
        padded: Whether a sequence may be longer: padding, which a mask hides, follows the grid.
        why: Why there is no grid, if there is none.
    """

    each: tuple[Layout, ...] = ()
    padded: bool = False
    why: str = ""

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis of the first sample."""
        return self.each[0].grid if self.each else ()

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        if self.why:
            return self.why
        found = self.each[:1] if len(set(self.each)) == 1 else self.each
        rest = [length - layout.length for layout in found]
        if min(rest) < 0 or (max(rest) and not self.padded):
            return f"a sequence of {length} tokens is not {' or '.join(map(str, dict.fromkeys(found)))}"
        return tuple(replace(one, suffix=one.suffix + n) if n else one for one, n in zip(found, rest, strict=True))
