"""What one patched diffusers model knows while it runs, on top of what every adapter's run knows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from visattn.keep import outside_of_modes
from visattn.layout import Layout
from visattn.pipelines.families.base import Family, Seen
from visattn.pipelines.patch import numbering
from visattn.runtime.run import Run, Step
from visattn.runtime.where import Given, Where
from visattn.schedule import Schedule

if TYPE_CHECKING:
    from visattn.pipelines.patch.sharding import Sharding


class DiffusersRun(Run):
    """The state of one patched diffusers model, shared by its groups; safe to use from several threads.

    Attributes:
        family: What is known about the model's class.
        config: The model's configuration.
        check_sites: Called before each forward, to see what others have changed.
        token: Tells one run of the pipeline from another.
        called: Tells what the pipeline calls this call of the model, None where it does not.
        number: By which hooks and compiled code know it.
        lease: The right to it, None after the patch.
        sharding: How processes share the model's tokens, None if they do not.
        patched: The patch, None until it is whole.
        paths: Of the modules, in the order of the numbers that compiled code tells; () where it tells none.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        config: Any,
        schedule: Schedule,
        layouts: Sequence[Layout],
        strict: bool,
        steps: Sequence[Callable[[], Step]],
        always: bool = False,
    ) -> None:
        super().__init__(
            name, schedule, strict, steps, family.mask_row, always, family.wider, family.pieces, family.apart
        )
        self.family, self.config = family, config
        self._given = Given.of(layouts) if layouts else None
        self.check_sites: Callable[[], None] = lambda: None
        self.token: Callable[[], Hashable] = lambda: None
        self.called: Callable[[], Hashable] = lambda: None
        self.lease: numbering.Lease | None = numbering.register(self)
        self.number: int = self.lease.number
        self.sharding: Sharding | None = None
        self.patched: Any = None
        self.paths: tuple[str, ...] = ()
        self._read: tuple[weakref.ref[torch.Tensor], int, Seen, tuple[Any, ...]] | None = None

    def release(self) -> None:
        """Give the number up; a second call does nothing."""
        if self.lease is not None:
            self.lease.end()
            self.lease = None

    def begin(self, seen: Seen, compiled: bool = False, gradients: bool | None = None) -> None:
        """A forward of the model begins; compiled code does not tell when it ends.

        Args:
            seen: What its arguments tell.
            compiled: Whether compiled code tells it.
            gradients: Whether gradients are switched on around the model, None for what they are here.
        """
        if compiled and self.here.forward is not None:
            self.finish()
        self.check_sites()
        # Operators run without gradients whatever the code around them does.
        self.start(self._where(seen), True if compiled else None, gradients)

    def run_token(self) -> Hashable:
        """See `Run.run_token`."""
        return self.token()

    def forward_name(self) -> Hashable:
        """See `Run.forward_name`."""
        return self.called()

    def _where(self, seen: Seen) -> Where | Given:
        if self._given is not None:
            return self._given
        if self.family.read is not None and seen.ids is not None:
            seen = self._reading(seen.ids, seen)
        grid = tuple(int(n) for n in seen.grid)
        family = self.family
        return Where(
            grid, int(seen.prefix), int(seen.suffix), family.levels, seen.why, seen.samples, early=family.early
        )

    def _reading(self, ids: torch.Tensor, seen: Seen) -> Seen:
        """Read a tensor's values, which waits for the GPU, once for all steps that pass the same tensor."""
        known, version = self._read, ids._version if not ids.is_inference() else 0
        if known is None or known[0]() is not ids or known[1] != version or known[3] != seen[:3]:
            assert self.family.read is not None
            if ids.is_meta or hasattr(ids, "fake_mode"):
                kind = "meta" if ids.is_meta else "fake"
                return seen._replace(ids=None, why=f"its position ids are {kind} tensors, which have no values")
            read = partial(self.family.read, self.config, ids, seen)
            # Numbers that are read are nothing that torch.func differentiates, and fake modes would hide them.
            modes = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
            told = outside_of_modes(read) if modes else read()
            known = (weakref.ref(ids), version, told._replace(ids=None), seen[:3])
            self._read = known
        return known[2]
