"""Packages that bring plug-ins, as pip would leave them, and the files that docs/extending.md builds."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

from scripts.pages import ROOT, blocks
from visattn.registry import REGISTRY


class Site:
    """A folder on sys.path in which packages can be installed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._modules = folder, []
        sys.path.insert(0, str(folder))

    def install(self, name: str, code: str, points: dict[str, dict[str, str]]) -> None:
        """A package of one module with entry points, by group and name."""
        (self.folder / f"{name}.py").write_text(code)
        info = self.folder / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"[{group}]\n" + "".join(f"{n} = {t}\n" for n, t in names.items()) for group, names in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        self._modules.append(name)
        REGISTRY.scan()

    def close(self) -> None:
        """Uninstall all."""
        sys.path.remove(str(self.folder))
        for name in self._modules:
            sys.modules.pop(name, None)
        sys.path_importer_cache.pop(str(self.folder), None)
        REGISTRY.scan()


def page_code(start: str) -> str:
    """The Python block of docs/extending.md in which a text stands."""
    (code,) = (b.code for b in blocks(ROOT / "docs" / "extending.md") if b.language == "python" and start in b.code)
    return code


def page_points(group: str) -> dict[str, dict[str, str]]:
    """The entry points of a group that docs/extending.md shows."""
    found = [tomllib.loads(b.code) for b in blocks(ROOT / "docs" / "extending.md") if b.language == "toml"]
    (points,) = (f["project"]["entry-points"] for f in found if group in f["project"]["entry-points"])
    return points


def lines_of_code(text: str) -> int:
    """Lines that are not empty."""
    return len(re.findall(r"^\s*\S", text, re.MULTILINE))
