"""Copies and pickles of a patched module are of the stock module: a patch belongs to its handle, and they have none.

Copying and pickling ask an object, not its class, how it is reduced. So a patched module has an answer of its own among
its attributes for as long as it is patched, whatever class others give it meanwhile.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# The attribute that `copy` and `pickle` look for.
REDUCE = "__reduce_ex__"
# The dictionaries of a module's hooks, with those that say how hooks are called, by the same numbers.
HOOKS = (
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def unpatched(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copy made by a class that copies its attributes itself."""


def _unpatched() -> Callable[..., None]:
    return unpatched


class Hook:
    """A hook of a patch, which copies of its module do without."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpatched, ()


class StockCopy:
    """How a patched module is copied: without our hooks and attributes, of its stock class.

    Args:
        module: The module.
        attributes: Names of the attributes that the patch gave it.
        classes: The stock class of each class that the patch gives to modules.
    """

    def __init__(self, module: Any, attributes: tuple[str, ...], classes: Mapping[type, type]) -> None:
        self.module, self.attributes, self.classes = module, attributes, classes

    def __call__(self, protocol: Any) -> Any:
        """The module's `__reduce_ex__`."""
        reduced = type(self.module).__reduce_ex__(self.module, protocol)  # type: ignore[call-arg]
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        made, arguments, state, *rest = reduced
        if made is copyreg.__newobj__ and arguments[0] in self.classes:  # type: ignore[attr-defined]
            # pickle insists that __newobj__ makes an object of the same class; the older form does not.
            made, arguments = copyreg._reconstructor, (self.classes[arguments[0]], object, None)  # type: ignore[attr-defined]
        left_out = (*self.attributes, REDUCE)
        state = {name: value for name, value in state.items() if name not in left_out}
        for hooks, *flags in HOOKS:
            ours = {number for number, hook in state.get(hooks, {}).items() if isinstance(hook, Hook)}
            for name in (hooks, *flags):
                if name in state:
                    state[name] = type(state[name])((n, h) for n, h in state[name].items() if n not in ours)
        return made, arguments, state, *rest


def copy_as_stock(module: Any, attributes: tuple[str, ...] = (), classes: Mapping[type, type] | None = None) -> None:
    """Let copies and pickles of a patched module be stock, until `copy_as_is`; see `StockCopy`."""
    module.__dict__[REDUCE] = StockCopy(module, attributes, classes or {})


def copy_as_is(module: Any) -> None:
    """Undo `copy_as_stock`."""
    module.__dict__.pop(REDUCE, None)


class Hooks:
    """The hooks of a patch.

    Attributes:
        modules: Modules that have one.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._handles: list[Any] = []

    def before(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        """Call a `Hook` before a module's forward."""
        self.modules.append(module)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def after(self, module: nn.Module, hook: Any, with_kwargs: bool = False, always: bool = False) -> None:
        """Call a `Hook` after a module's forward; `always` also after one that raised, without an output."""
        self.modules.append(module)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always))

    def remove(self) -> None:
        """Take all hooks off, and let their modules be copied as they are; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            copy_as_is(module)
        self._handles, self.modules = [], []
