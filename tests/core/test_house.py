"""The order of the house: how long files and functions are, and what rooms say about themselves."""

import ast
import statistics

from tests.support.places import ROOT

PLACES = {
    "visattn": ROOT / "visattn",
    **{f"visattn.{n}": ROOT / n for n in ("kernels", "models", "pipelines")},
}


def modules():
    """Every module of the package with its file; rglob follows no links, so each has one name."""
    found = {}
    for package, folder in PLACES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = modules()


def lines(files):
    return {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def test_files_fit_a_head():
    sizes = lines(file for file in MODULES.values() if file.read_text().strip())
    assert statistics.median(sizes.values()) <= 125
    everywhere = sizes | lines([*(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    assert not {str(file): size for file, size in everywhere.items() if size > 400}


def test_functions_fit_a_screen():
    sizes = []
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        # Code of a GPU kernel is as long as its loops and arguments need.
        functions = [node for node in functions if not any("jit" in ast.unparse(d) for d in node.decorator_list)]
        sizes += [(node.end_lineno - node.lineno + 1, f"{name}.{node.name}") for node in functions]
    sizes.sort()
    assert sizes[int(0.99 * len(sizes))][0] <= 50, sizes[-len(sizes) // 100 :]


def test_rooms_of_kernels_say_what_is_in_which_file():
    for name, file in MODULES.items():
        if name.startswith("visattn.kernels") and file.name == "__init__.py":
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            others = [m.stem for m in file.parent.glob("*.py") if m.stem not in ("__init__", "backend")]
            assert not [other for other in others if f"`{other}`" not in text], file


def test_the_table_of_the_design_has_every_module_beside_the_rooms():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = "".join(line for line in page.splitlines() if line.startswith("| `"))
    names = {file.name for file in (ROOT / "visattn").glob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert len(names) > 50
    assert not {name for name in names if f"`visattn/{name}`" not in table and f"`{name}`" not in table}
