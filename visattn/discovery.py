"""Lets diffusers find the classes of the embedded pipelines by name, so that it loads their folders as its own.

`DiffusionPipeline.from_pretrained` looks the class of a pipeline up in the namespace of diffusers and nowhere else. The
names are added there when diffusers is imported, before or after visattn, and a class is imported when it is asked for:
`import visattn` stays light.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY = "diffusers"


def embedded_class(name: str) -> Any:
    """The pipeline class of this name.

    Raises:
        AttributeError: If no embedded model has it, which lets diffusers look on for itself.
    """
    if name.startswith("Pixel"):
        for path in import_module("visattn.pipelines.embedded").PIPELINES:
            module, cls = path.split(":")
            if cls == name:
                return getattr(import_module(module), cls)
    raise AttributeError(f"module {LIBRARY!r} has no attribute {name!r}")


class AfterImport(MetaPathFinder):
    """Finds diffusers as the other finders do, and adds the names once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the next finder that has one, whose loader also adds the names; None of other modules."""
        if fullname != LIBRARY:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _extend(spec)
                return spec
        return None


def _extend(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    if loader is None:
        return
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        if module.__name__ == LIBRARY:
            add_names()

    loader.exec_module = exec_module


def add_names() -> None:
    """Adds the names to diffusers, if it is imported."""
    library = sys.modules.get(LIBRARY)
    if library is not None:
        # diffusers puts an object of its own class in its place, whose lookup goes on where this one fails (PEP 562).
        library.__dict__["__getattr__"] = embedded_class


def install() -> None:
    """Adds the names now or, where diffusers is not imported yet, then."""
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())
    add_names()
