"""Doors for what others write: patterns, backends, diffusers families, timm attention, adapters; see docs/extending.md.

An installed package opens them without a call, by entry points of the groups `visattn.patterns`, `visattn.backends`,
`visattn.families`, `visattn.attention` and `visattn.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from visattn.entries import Plugin
from visattn.given import said
from visattn.registry import HOMES, REGISTRY, Registration

if TYPE_CHECKING:
    from visattn.dispatch import Backend
    from visattn.models.swap.records import Record
    from visattn.patterns import Pattern
    from visattn.pipelines.families.base import Family
    from visattn.request import Patch, Request


def register_pattern(kind: type[Pattern]) -> Registration:
    """Let texts name a pattern: `attention(q, k, v, "NAME(...)", layout)`, `apply`, files and the command line.

    Args:
        kind: A frozen dataclass derived from `visattn.patterns.Pattern` with a `name`.

    Returns:
        A registration whose `remove()`, or `with` block, takes it back. Defining the class again and registering it
        replaces the old one.

    Raises:
        ValueError: If it is no such class, or another has its name.
    """
    return REGISTRY.door("pattern").add({getattr(kind, "name", ""): kind}, f"register_pattern in {_module(kind)}")


def register_backend(backend: Backend) -> Registration:
    """Let a backend run calls: by its name, and where it is the cheapest also with "auto".

    Args:
        backend: An instance of a subclass of `visattn.dispatch.Backend` with a `name`.

    Returns:
        A registration whose `remove()`, or `with` block, takes it back.

    Raises:
        ValueError: If it is no such object, or another has its name.
    """
    name = getattr(backend, "name", "")
    return REGISTRY.door("backend").add({name: backend}, f"register_backend in {_module(type(backend))}")


def register_family(family: Family) -> Registration:
    """Let `apply` patch diffusers models of the classes that a family names.

    Args:
        family: Where the self-attention of these models is and where their tokens sit.

    Returns:
        A registration whose `remove()`, or `with` block, takes it back.

    Raises:
        ValueError: If it is no family, or one of its classes belongs to another.
    """
    classes = getattr(family, "classes", None) or ("",)
    return REGISTRY.door("family").add(dict.fromkeys(classes, family), "register_family")


def register_attention(kind: type | str, record: Record) -> Registration:
    """Let `apply` swap an attention class in timm models.

    Args:
        kind: The class, or its "module.name" where it should not be imported yet.
        record: How it is swapped.

    Returns:
        A registration whose `remove()`, or `with` block, takes it back.

    Raises:
        ValueError: If the record is none, or the class has one.
    """
    if not isinstance(kind, type | str):
        raise ValueError(f"kind={said(kind)} must be an attention class, or its 'module.name'")
    path = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return REGISTRY.door("attention").add({path: record}, "register_attention")


def register_adapter(package: str, install: Callable[[Any, Request], Sequence[Patch]]) -> Registration:
    """Let `apply` patch models and pipelines of another library.

    Args:
        package: Top-level package of the classes of these models, like "diffusers".
        install: Patches a target as a request says and returns what undoes it.

    Returns:
        A registration whose `remove()`, or `with` block, takes it back.

    Raises:
        ValueError: If `install` cannot be called, or the package has an adapter.
    """
    if not isinstance(package, str) or not package.isidentifier():
        raise ValueError(f"package={said(package)} must be the name of a package, like 'diffusers'")
    return REGISTRY.door("adapter").add({package: install}, f"register_adapter in {_module(install)}")


def plugins() -> tuple[Plugin, ...]:
    """What did not come with visattn, each imported to see whether it can be used; reads the entry points again.

    Returns:
        Kind by kind, with the problem of each that cannot be used.
    """
    REGISTRY.scan()
    found: list[Plugin] = []
    for kind in HOMES:
        added = REGISTRY.added(kind)
        if not added:
            continue
        try:
            found += REGISTRY.door(kind).plugins()
        except ImportError as error:
            # The room of a kind needs its library: timm for attention.
            found += [Plugin(kind, name, entry.source, str(error)) for name, entry in added.items()]
    return tuple(found)


def _module(thing: object) -> str:
    return str(getattr(thing, "__module__", type(thing).__module__))
