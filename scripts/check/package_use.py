"""Installs a wheel in an environment of nothing but what it requires, and uses it from another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

COMMANDS = (
    ("--help",),
    ("--version",),
    ("doctor",),
    ("simulate", "na(window=5x5)", "--grid", "16x16"),
    ("show", "na(window=5x5)", "--grid", "16x16", "--out", "window.png"),
)


def run(command: Iterable[str | Path], folder: Path) -> str:
    """Output of a command that must succeed, in an environment without the caller's own Python settings."""
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"package: {' '.join(words)} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata requires, extras included."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def required(texts: list[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements name without extras, and what they require in turn."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(text, "") for text in texts]
    while todo:
        text, extra = todo.pop()
        if (text, extra) in seen:
            continue
        seen.add((text, extra))
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = distribution(one.name)
        except PackageNotFoundError:
            raise SystemExit(f"package: {one} is required, but not installed here") from None
        found[re.sub(r"[-_.]+", "-", one.name).lower()] = installed
        todo += [(inner, each) for inner in installed.requires or [] for each in ("", *one.extras)]
    return found


def link(distributions: Iterable[Distribution], target: Path) -> None:
    """Link what these distributions installed into another environment's site-packages, without a copy."""
    for one in distributions:
        tops = {file.parts[0] for file in one.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            # Distributions may share a folder (nvidia): the first one links it for all.
            if not (target / top).exists():
                (target / top).symlink_to(Path(str(one.locate_file(top))).resolve())


def empty_environment(wheel: Path, folder: Path) -> Path:
    """Make an environment with the wheel and what it requires; returns its folder of programs."""
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    link(required(requirements(wheel)).values(), Path(paths["purelib"]))
    programs = Path(paths["scripts"])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", programs / "python"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    return programs


def use(wheel: Path, folder: Path) -> None:
    """Import, attend, and run the quick commands, from a folder that has nothing of the checkout."""
    programs = empty_environment(wheel, folder / "environment")
    script = folder / "use.py"
    shutil.copy(Path(__file__).with_name("package_outside.py"), script)
    run([programs / "python", "-P", script], folder)
    for command in COMMANDS:
        run([programs / "visattn", *command], folder)
    if not (folder / "window.png").stat().st_size:
        raise SystemExit("package: visattn show wrote an empty picture")
