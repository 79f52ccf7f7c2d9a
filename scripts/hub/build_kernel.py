"""Lays the tile-list kernels out as a noarch kernel of the hub: source, and the folders that clients load.

python -m scripts.hub.build_kernel --out out/kernel
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
from pathlib import Path

from scripts.pages import ROOT
from visattn.version import __version__

NAME = "visattn-tiles"
MODULE = NAME.replace("-", "_")
# Of the kernel's interface: names in `__all__` and what they take.
VERSION = 0
IDENTITY = f"{MODULE}_v{VERSION}"
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
# Where each file of the kernel comes from.
FILES = {
    "attention.py": "scripts/hub/attention.py",
    "parts.py": "kernels/triton/parts.py",
    "forward.py": "kernels/triton/lists/forward.py",
    "key_grad.py": "kernels/triton/lists/key_grad.py",
    "query_grad.py": "kernels/triton/lists/query_grad.py",
    "delta.py": "kernels/triton/lists/delta.py",
}
INIT = '''"""Attention of query tiles to lists of key tiles, forward and backward, in Triton."""

from .attention import Lists, Plan, tile_attention, tile_attention_backward

__all__ = ["Lists", "Plan", "tile_attention", "tile_attention_backward"]
'''
OLD_CLIENTS = '''"""Clients of before 2026 look for the name one folder deeper."""

from .. import *  # noqa: F403
'''
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
pyext = ["py"]
"""
CARD = f"""# {NAME}

Attention along tile lists: each tile of queries attends to its list of key tiles, under masks of single pairs where a
tile is seen in part. Forward and backward in Triton, made from visattn {__version__}, whose plans
(`scripts/hub/lists.py`) are what `Plan` holds.
"""


def relative(source: str) -> str:
    """The source of a module with its imports from the package as imports from the folder it is laid out in.

    Raises:
        ValueError: If it needs more of the package than is there.
    """

    def near(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        if f"{name}.py" not in FILES:
            raise ValueError(f"{match[1]} is no file of the kernel: {', '.join(FILES)}")
        return f"from .{name} import"

    return re.sub(r"^from (visattn\.[\w.]+) import", near, source, flags=re.MULTILINE)


def check(name: str, source: str) -> None:
    """Raise a ValueError if a module is not for Python 3.9, or imports more than a kernel may."""
    tree = ast.parse(source, name, feature_version=(3, 9))
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        wrong = [each for each in found if each.partition(".")[0] not in ("__future__", "typing", "torch", "triton")]
        if wrong:
            raise ValueError(f"{name} imports {', '.join(wrong)}: a kernel may import torch, triton and itself")


def build(out: Path) -> None:
    """Write the kernel into an empty or absent folder.

    Raises:
        ValueError: If there is something already, or a file is not what a kernel may hold.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: pass another --out, or remove it")
    files = {name: relative((ROOT / source).read_text(encoding="utf-8")) for name, source in FILES.items()}
    files["__init__.py"] = INIT
    for name, source in files.items():
        check(name, source)
    _write(out / "torch-ext" / MODULE, files)
    _write(out, {"build.toml": BUILD, "CARD.md": CARD})
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        _write(folder, {**files, "metadata.json": _metadata(backend)})
        _write(folder / MODULE, {"__init__.py": OLD_CLIENTS})


def _metadata(backend: str) -> str:
    found = {
        "name": NAME,
        "id": IDENTITY,
        "version": VERSION,
        "license": "Apache-2.0",
        "backend": {"type": backend},
        "python-depends": [],
    }
    return json.dumps(found, indent=2) + "\n"


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    build(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
