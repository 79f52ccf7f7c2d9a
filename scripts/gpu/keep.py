"""Packs what steps wrote into a few archives of limited size, each whole by itself, and unpacks them again."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from visattn.files import written_whole

# Bytes of an archive, before it is compressed: so it is never larger.
PART = 15 * 2**20
# What tar adds to a file, and to an archive, at most.
HEAD = 4096
NAMES = "kept-*.tar.gz"
CUT = ".cut-"


class Piece(NamedTuple):
    """A part of a file, which goes into an archive under a name."""

    name: str
    file: Path
    first: int
    bytes: int


def pieces_of(name: str, file: Path, size: int, part: int = PART) -> list[Piece]:
    """A file as one piece, or as several where it is larger than an archive."""
    most = part - 2 * HEAD
    count = max(1, -(-size // most))
    if count == 1:
        return [Piece(name, file, 0, size)]
    return [Piece(f"{name}{CUT}{i:03}-of-{count:03}", file, i * most, min(most, size - i * most)) for i in range(count)]


class Kept:
    """What is kept of a run, in FOLDER/kept-0.tar.gz and so on.

    Args:
        folder: For the archives.
        parts: Archives at most.
        part: Bytes of an archive at most.

    Raises:
        ValueError: If the folder has archives of an earlier run, or the sizes hold nothing.
    """

    def __init__(self, folder: Path, parts: int, part: int = PART) -> None:
        if parts < 1 or part <= 3 * HEAD:
            raise ValueError(f"{parts} archives of {part} bytes hold nothing: ask for at least one of {4 * HEAD}")
        self._folder, self._parts, self._part = folder, parts, part
        self._state: list[list[tuple[str, int, int]]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob(NAMES)):
            raise ValueError(f"{folder} has archives of an earlier run: unpack and remove them, or name another folder")

    def write(self, files: Sequence[tuple[str, Path]]) -> list[str]:
        """Write the archives that have changed; returns the names of files that have no place.

        Args:
            files: Name in the archives and file, those that matter the most first.
        """
        archives: list[list[Piece]] = []
        left, state = [], []
        room: list[int] = []
        for name, file in files:
            try:
                about = file.stat()
            except OSError:
                # It was moved or removed since it was listed.
                continue
            placed = self._placed(pieces_of(name, file, about.st_size, self._part), archives, room)
            if not placed:
                left.append(name)
                continue
            for at, piece in placed:
                while len(state) <= at:
                    state.append([])
                state[at].append((piece.name, piece.bytes, about.st_mtime_ns))
        with ExitStack() as stack:
            # They take their places together, so that a file that changes its archive is always in one.
            for at, pieces in enumerate(archives):
                if at >= len(self._state) or self._state[at] != state[at]:
                    path = stack.enter_context(written_whole(self._folder / f"kept-{at}.tar.gz"))
                    _pack(path, pieces)
        for at in range(len(archives), len(self._state)):
            (self._folder / f"kept-{at}.tar.gz").unlink(missing_ok=True)
        self._state = state
        return left

    def _placed(
        self, pieces: list[Piece], archives: list[list[Piece]], room: list[int]
    ) -> list[tuple[int, Piece]] | None:
        """Puts all pieces of a file into the first archives that have room for them; None if there are none."""
        free = [*room, *[self._part - HEAD] * (self._parts - len(room))]
        places = []
        for piece in pieces:
            needed = piece.bytes + HEAD
            at = next((at for at, bytes_ in enumerate(free) if bytes_ >= needed), None)
            if at is None:
                return None
            free[at] -= needed
            places.append((at, piece))
        last = max(at for at, _ in places)
        while len(archives) <= last:
            archives.append([])
        room[:] = free[: len(archives)]
        for at, piece in places:
            archives[at].append(piece)
        return places


def _pack(path: Path, pieces: Sequence[Piece]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for piece in pieces:
            # Whole in memory: a file that grows while it is read would break the archive.
            with piece.file.open("rb") as file:
                file.seek(piece.first)
                content = file.read(piece.bytes)
            about = tarfile.TarInfo(piece.name)
            about.size, about.mtime = len(content), int(piece.file.stat().st_mtime)
            archive.addfile(about, io.BytesIO(content))


def unpack(folder: Path, into: Path) -> list[Path]:
    """Writes the files of all archives of a folder below another one; returns them.

    Raises:
        ValueError: If there is no archive, a name leads elsewhere, or, once all others are written, a piece of a file
            is missing.
    """
    archives = sorted(folder.glob(NAMES))
    if not archives:
        raise ValueError(f"{folder} has no {NAMES}: name the folder that a run wrote to")
    cut: dict[str, dict[int, bytes]] = {}
    counts: dict[str, int] = {}
    whole: dict[str, bytes] = {}
    for name, content in _members(archives):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name} in {folder} leads out of the folder: these are no archives of a run")
        if CUT not in path.name:
            whole[name] = content
            continue
        own, _, place = name.rpartition(CUT)
        number, _, count = place.partition("-of-")
        cut.setdefault(own, {})[int(number)], counts[own] = content, int(count)
    whole |= {
        name: b"".join(parts[i] for i in sorted(parts)) for name, parts in cut.items() if len(parts) == counts[name]
    }
    written = []
    for name, content in whole.items():
        file = into / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            temporary.write_bytes(content)
        written.append(file)
    if torn := [name for name in cut if name not in whole]:
        name = torn[0]
        raise ValueError(
            f"{name} has {len(cut[name])} of {counts[name]} pieces: bring all archives; {len(written)} other files "
            f"are written to {into}"
        )
    return written


def _members(archives: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in archives:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    yield member.name, content.read()
