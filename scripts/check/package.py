"""Builds sdist and wheel, checks that nothing is missing or foreign, and uses the wheel in an empty environment.

python -m scripts.check.package       # about half a minute
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from scripts.check.package_use import run, use
from scripts.pages import ROOT

# Folders of the checkout and where a wheel puts them.
ROOMS = {"visattn": "visattn", **{room: f"visattn/{room}" for room in ("kernels", "models", "pipelines")}}
BESIDE = ("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py", "docs/design.md")


def clean_copy(target: Path) -> list[str]:
    """Copy what git knows or would add, so that no leftover of an earlier build gets in; returns the names."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT)
    names = [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return names


def without_links(checkout: Path) -> None:
    """Turn links into the text files that a checkout has where links cannot be made (Windows)."""
    for link in [path for path in checkout.rglob("*") if path.is_symlink()]:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)


def contents(wheel: Path) -> dict[str, bytes]:
    """Each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_contents(shipped: dict[str, str], sdist: Path, wheel: dict[str, bytes]) -> None:
    """Every file of every room is in both, and the wheel has nothing else."""
    installed = {name for name in wheel if ".dist-info/" not in name}
    if missing := sorted(set(shipped) - installed):
        raise SystemExit(f"package: not in the wheel, see packages and package-data in pyproject.toml: {missing}")
    if foreign := sorted(installed - set(shipped)):
        raise SystemExit(f"package: in the wheel, but in no room: {foreign}")
    licences = {name.rpartition("/")[2] for name in wheel if ".dist-info/licenses/" in name}
    if licences != {"LICENSE", "NOTICE"}:
        raise SystemExit(f"package: the wheel's licence files are {sorted(licences)}, expected LICENSE and NOTICE")
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers()}
    if missing := sorted({*shipped.values(), *BESIDE} - inside):
        raise SystemExit(f"package: not in the sdist, see MANIFEST.in: {missing}")


def build(folder: Path) -> Path:
    """Build from a clean copy in `folder` and check both archives; returns the wheel."""
    checkout, dist, again = folder / "checkout", folder / "dist", folder / "again"
    names = clean_copy(checkout)
    rooms = {name: name.partition("/") for name in names if not (checkout / name).is_symlink()}
    shipped = {f"{ROOMS[room]}/{rest}": name for name, (room, _, rest) in rooms.items() if room in ROOMS}
    tool = [sys.executable, "-m", "build", "--no-isolation"]
    run([*tool, "--outdir", dist, checkout], folder)  # the sdist, and the wheel from it
    without_links(checkout)
    run([*tool, "--wheel", "--outdir", again, checkout], folder)
    (sdist,), (wheel,), (other,) = dist.glob("*.tar.gz"), dist.glob("*.whl"), again.glob("*.whl")
    run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], folder)
    first, second = contents(wheel), contents(other)
    if differing := sorted(name for name in {*first, *second} if first.get(name) != second.get(name)):
        raise SystemExit(f"package: the wheel of the sdist differs from that of the checkout: {differing}")
    check_contents(shipped, sdist, first)
    return wheel


def main(arguments: list[str] | None = None) -> None:
    """Build, check, use."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    with tempfile.TemporaryDirectory(prefix="visattn-package-") as name:
        wheel = build(Path(name))
        use(wheel, Path(name) / "elsewhere")
        print(f"package: {wheel.name} and its sdist hold every file; the wheel works without extras")


if __name__ == "__main__":
    main()
