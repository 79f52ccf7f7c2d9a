"""The real import graph of the package, read from the source of every file: imports go one way between rooms."""

import ast
import graphlib
import os
from functools import cache
from pathlib import Path

import pytest

import visattn

ROOT = Path(visattn.__file__).parent
# From the bottom up: a room imports itself and rooms of lower rank, in functions too.
RANKS = ("foundations", "patterns", "core", "kernels", "adapters", "cli")
FOUNDATIONS = ("entries", "given", "keep", "layout", "memory", "operands", "registry", "tiling", "version")
# What in core names things of higher rooms, never while it is imported: public names, what registers, the watcher.
DOORS = {"visattn", "visattn.doors", "visattn.watch"}
# When an import happens: on import of the module, in a call, or never (annotations only).
LOADED, CALLED, TYPED = "loaded", "called", "typed"


@cache
def modules():
    """File of each module by its name."""
    found = {}
    for folder, _, names in os.walk(ROOT, followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = ("visattn", *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path):
    """What a file imports from the package, and when: {(module, when)}."""
    found = set()

    def visit(node, when):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update((alias.name, when) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: relative imports hide where a name comes from"
                names = {f"{child.module}.{alias.name}" for alias in child.names}
                found.update((name if name in modules() else child.module, when) for name in names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                visit(child, TYPED)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == LOADED:
                visit(child, CALLED)
            else:
                visit(child, when)

    visit(ast.parse(path.read_text()), LOADED)
    return {(name, when) for name, when in found if name in modules()}


@cache
def graph():
    """Every edge of the package: (module, what it imports, when)."""
    return {(name, other, when) for name, path in modules().items() for other, when in imports(path) if other != name}


def room(module):
    """The room of a module."""
    name = module.split(".")[1:] or ["core"]
    if name[0] in ("pipelines", "models", "clients"):
        return "adapters"
    if name[0] in RANKS:
        return name[0]
    if name[0] == "__main__":
        return "cli"
    return "foundations" if name[0] in FOUNDATIONS else "core"


def cycle(edges):
    """A cycle of a graph, empty if there is none."""
    before = {}
    for name, other in edges:
        before.setdefault(name, set()).add(other)
    try:
        list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_the_graph_is_the_packages():
    found = modules()
    assert {"visattn.patterns.text", "visattn.kernels.triton.backend", "visattn.pipelines.patch.run"} <= set(found)
    assert ("visattn.attend", "visattn.checks", LOADED) in graph()
    assert ("visattn.patterns.kinds", "visattn.patterns.pooling", CALLED) in graph()
    assert any(when == TYPED for *_, when in graph())
    assert {room(name) for name in found} == set(RANKS)


def test_no_module_imports_one_that_imports_it():
    """Annotations count: a name that two modules take from each other belongs into a third."""
    assert not cycle({(name, other) for name, other, when in graph() if when != CALLED})


def test_imports_go_one_way_between_rooms():
    upward = {edge for edge in graph() if RANKS.index(room(edge[0])) < RANKS.index(room(edge[1]))}
    assert {name for name, *_ in upward} == DOORS
    assert all(when != LOADED for *_, when in upward)


@pytest.mark.parametrize("below", ["foundations", "patterns", "core"])
def test_no_function_hides_a_cycle_below_the_backends(below):
    """Here not even an import inside a function leads back."""
    rooms = RANKS[: RANKS.index(below) + 1]
    assert not cycle({(name, other) for name, other, _ in graph() if room(name) in rooms and name != "visattn"})


def test_the_adapters_know_nothing_of_each_other():
    def which(module):
        return module.split(".")[1:3] if module.startswith("visattn.clients.") else module.split(".")[1:2]

    pairs = [(name, other) for name, other, _ in graph() if room(name) == room(other) == "adapters"]
    assert len(pairs) > 100
    assert not [(name, other) for name, other in pairs if which(name) != which(other)]


def test_a_cycle_is_found():
    assert cycle({("a", "b"), ("b", "c"), ("c", "a")}) and not cycle({("a", "b"), ("a", "c"), ("b", "c")})
