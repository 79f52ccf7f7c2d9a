"""What `apply` asks of the adapter for a target, what it gets from it, and which adapters there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from visattn.given import counted, said
from visattn.layout import Layout
from visattn.parameters import Learnable
from visattn.registry import REGISTRY
from visattn.report import SiteReport
from visattn.schedule import Schedule
from visattn.watch import Watcher


@dataclass(frozen=True)
class Request:
    """What `apply` asks of an adapter.

    Attributes:
        schedule: Pattern of each layer, dense layers and steps.
        backend: "auto" or the name of a backend.
        layouts: Where the tokens sit, for models of unknown classes, one for each length of a sequence; () to find out.
        strict: Whether a forward that misses a selected module raises.
        always: Whether the pattern runs also where dense attention is estimated to be faster.
        caught: Queries of each call whose caught attention is measured, 0 for none.
        parallel: How processes share a model's tokens, "ulysses" or "halo"; None if they do not.
        mesh: Which processes.
    """

    schedule: Schedule
    backend: str = "auto"
    layouts: tuple[Layout, ...] = ()
    strict: bool = False
    always: bool = False
    caught: int = 0
    parallel: str | None = None
    mesh: Any = None

    @property
    def layout(self) -> Layout | None:
        """The one layout of all sequences, None where it is to be found out.

        Raises:
            ValueError: If there are several.
        """
        if len(self.layouts) > 1:
            raise ValueError(f"layout has {len(self.layouts)} layouts, which only models of diffusers take: pass one")
        return self.layouts[0] if self.layouts else None


class Patch(Protocol):
    """One patched model."""

    def remove(self) -> None:
        """Put the original attention back; a second call does nothing."""
        ...

    def set_step(self, step: int | None, total: int | None) -> None:
        """Say which denoising step (from 0) of how many comes next; None for "find out"."""
        ...

    def report(self) -> Sequence[SiteReport]:
        """What happened at each patched module, in the order of the layers."""
        ...

    def learnables(self) -> Sequence[Learnable]:
        """The modules whose pattern has learnable parameters, in the order of the layers."""
        ...

    def watch(self, watcher: Watcher | None) -> None:
        """Call a function at every attention call, or no more."""
        ...


def _accept(package: str, install: Any) -> Callable[[Any, Request], Sequence[Patch]]:
    if not callable(install):
        raise ValueError(f"{said(install)} must be a function install(target, request) that returns what undoes it")
    return cast("Callable[[Any, Request], Sequence[Patch]]", install)


# What patches the models of each package.
ADAPTERS = REGISTRY.declare(
    "adapter",
    {
        "diffusers": "visattn.pipelines.patch.install:install",
        "timm": "visattn.models.swap.install:install",
        "transformers": "visattn.clients.transformers.install:install",
    },
    _accept,
)


def package_of(target: Any) -> str:
    """The package whose adapter patches the target, from the modules of its classes.

    Raises:
        ValueError: If there is no adapter for it.
    """
    model = getattr(target, "_orig_mod", target)
    held = _held(model)
    for kind in type(model).__mro__:
        if held and not _is_module(kind):
            # What wraps a model may take small classes of a package, like one that uploads to the hub.
            continue
        if kind.__module__.startswith("visattn.models."):
            return "timm"  # which has registered it
        package = kind.__module__.partition(".")[0]
        if package in ADAPTERS:
            return package
    kind, value = type(model), "" if _is_module(type(model)) else f"={said(target)}"
    raise ValueError(
        f"target{value}: cannot apply to a {kind.__module__}.{kind.__qualname__}: pass a diffusers pipeline or model, "
        f"a timm or a transformers model{held}; inside a model of your own call visattn.attention(q, k, v, "
        "pattern, layout)"
    )


def _is_module(kind: type) -> bool:
    """Whether a class is one of torch's modules; of targets that are none this loads no torch."""
    return hasattr(kind, "named_modules")


def _held(model: Any) -> str:
    """The models that a module holds (DistributedDataParallel, PeftModel, one's own with a backbone), in words."""
    found: dict[str, str] = {}
    for path, module in model.named_modules() if _is_module(type(model)) else ():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and _is_whole(module):
            found[path] = type(module).__name__
    if not found:
        return ""
    return f" (it holds {', '.join(f'a {kind}: target.get_submodule({path!r})' for path, kind in found.items())})"


def _is_whole(module: Any) -> bool:
    """Whether a module is a model of a package, and not one of its layers."""
    kinds = type(module).__mro__
    timm = any(kind.__module__.startswith(("timm.models.", "visattn.models.")) for kind in kinds)
    whole = any(kind.__name__ in ("ModelMixin", "PreTrainedModel") for kind in kinds)
    return whole or (timm and hasattr(module, "forward_features"))


def patched_already(name: str, found: Sequence[str], number: int) -> str:
    """What is said of a model some of whose modules have a patch.

    Args:
        name: What errors call the model.
        found: Names of those modules.
        number: How many modules were to be patched.
    """
    if len(found) == number:
        return f"{name} is patched already: call remove() on its handle before apply()"
    more = f" and {counted(len(found) - 1, 'more module')}" * (len(found) > 1)
    return (
        f"{name} is patched already at {found[0]}{more}: call remove() on its handle before apply(), or on that of "
        "another model which has the same module"
    )
