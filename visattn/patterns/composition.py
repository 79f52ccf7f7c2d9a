"""Compositions around the key tiles of another pattern, their `sparse` part."""

from __future__ import annotations

from visattn.patterns.kinds import ComposedPattern, ListedPattern, StaticPattern
from visattn.patterns.text import parse


class Composition(ComposedPattern):
    """A composed pattern with a part `sparse`: who sees whom, a pattern that the grid alone decides."""

    sparse: StaticPattern

    def parse_sparse(self) -> None:
        """Parse `sparse` where it is a text; for `__post_init__`.

        Raises:
            ValueError: If it is no pattern, or no list of tiles that is known without q and k.
        """
        pattern = parse(self.sparse)
        where = f"sparse={pattern} of {self.name}"
        if not isinstance(pattern, ListedPattern):
            raise ValueError(f"{where} is a composition: give a pattern that is a list of key tiles")
        if not isinstance(pattern, StaticPattern):
            raise ValueError(f"{where} computes its lists from q and k: give na, halo, clear or radial")
        object.__setattr__(self, "sparse", pattern)

    @property
    def inner(self) -> StaticPattern:
        """The sparse part."""
        return self.sparse

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the sparse part is not defined on this grid."""
        self.sparse.check(grid)

    def instead(self, grid: tuple[int, ...]) -> str:
        """A composition."""
        return f"a composition around {self.sparse}, which has a mask and a plan"
