"""Files that are never half written and never overwritten by accident."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visattn.given import said

if TYPE_CHECKING:
    import torch

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked.
    fcntl = None

# Begins the names of the hidden folder that a run writes to, and of hidden files, before they are whole.
UNFINISHED = ".unfinished-"


def cache_folder() -> Path:
    """$VISATTN_CACHE, by default a folder of ours in the user's cache folder."""
    base = os.environ.get("VISATTN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache"), "visattn"
    )
    return Path(base)


def read_values(path: Path) -> dict[str, Any]:
    """What a JSON file of values by name holds; nothing where it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def add_values(path: Path, more: Mapping[str, Any]) -> None:
    """Add values to such a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, read_values(path) | dict(more))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON; whole, so that nobody reads half of it, meanwhile or after an interruption.

    Args:
        path: The file, which is replaced; its folder is there.
        value: What JSON can say.
        indent: Of each level, None for one line.
    """
    with written_whole(path) as part:
        part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_tensors(path: Path, what: str, fix: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name of a safetensors file, and its metadata; errors as in `opened`."""
    with opened(path, what, fix) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def opened(path: Path, what: str, fix: str, needs: str = "") -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it.

    Args:
        path: The file.
        what: What it should be, as in "is no checkpoint".
        fix: What to do about one that is not.
        needs: Name in its metadata that tells it from other files, if there is one.

    Raises:
        ValueError: If it is missing, not whole or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist: {fix}")
    try:
        with safe_open(path, "pt") as file:
            if needs and needs not in (file.metadata() or {}):
                raise ValueError(f"{path} is no {what}: {fix}")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no {what}, or not whole ({error}): {fix}") from error


def read_text(path: Path) -> str:
    """The text of a file that a user wrote, in UTF-8; editors that mark that at its begin are fine.

    Raises:
        ValueError: If it is in anything else.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error


def as_path(given: Any) -> Path:
    """A path from what a user gave for one.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"{said(given)} is a {type(given).__name__}: pass the path of a file")
    return Path(given)


def check_writable_file(path: Path, suffixes: tuple[str, ...], force: bool = False) -> Path:
    """Check, before any computing, that a file can be written.

    Raises:
        ValueError: If the ending is not one of `suffixes`, the file exists without `force`, or its folder is
            missing or not writable.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: pass --force to overwrite it, or another name")
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist: make it first")
    _try_writing(path.parent)
    return path


def prepare_folder(folder: Path, force: bool = False) -> Path:
    """Make an output folder, before any computing; what an interrupted run has left in it is removed.

    Raises:
        ValueError: If it is a file, cannot be made or written, another run is writing to it, or it holds anything
            without `force`.
    """
    with _prepared(folder, force):
        return folder


@contextmanager
def _prepared(folder: Path, force: bool) -> Iterator[None]:
    """The same, and no other run may write to the folder before the block ends."""
    with alone(made_folder(folder)):
        # Of runs that are gone, as there is no other.
        for left in folder.glob(f"{UNFINISHED}*"):
            _remove_left(left)
        if any(folder.iterdir()) and not force:
            raise ValueError(f"{folder} is not empty: pass --force to overwrite what is there, or another folder")
        yield


def made_folder(folder: Path) -> Path:
    """Make a folder, and find out that it can be written, before any computing; it may hold anything.

    Raises:
        ValueError: If it is a file, or cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make folder {folder} ({error.strerror}): name one that you can write") from error
    _try_writing(folder)
    return folder


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a folder, or a file, for the length of the block: what another run would write there, mixed with this one's.

    A file need not be there, and may be replaced by the block: what is locked is a hidden file beside it. The operating
    system lets go of it however the process ends.

    Raises:
        ValueError: If another run has it.
    """
    folder = path.is_dir()
    locked = path if folder else path.with_name(f"{UNFINISHED}{path.name}.lock")
    lock = _lock(locked, folder)
    if lock is None:
        raise ValueError(f"another run is writing to {path}: wait until it ends, or name another")
    try:
        yield
    finally:
        if not folder and fcntl is not None:
            locked.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path, folder: bool) -> int | None:
    """Lock a folder or a file until the descriptor is closed or the process ends; None if another holds it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        if folder:
            # Who had it may just have removed it.
            path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        # On a file system without locks nothing tells who is running.
        with suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return None
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


def _remove_left(left: Path) -> None:
    """Remove what a run has left that is gone; what is being written to stays."""
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
        return
    with suppress(OSError):
        lock = os.open(left, os.O_RDWR)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        finally:
            os.close(lock)


def _try_writing(folder: Path) -> None:
    # Permission bits do not tell the truth for root or on network file systems: try it.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): name a folder that you can write") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, else disappears.

    What a killed process has left of the same file disappears too.
    """
    begin = f"{UNFINISHED}{path.stem}-"
    for left in path.parent.glob(f"{glob.escape(begin)}????????{glob.escape(path.suffix)}"):
        _remove_left(left)
    temporary, lock = _temporary(path.parent, begin, path.suffix)
    try:
        yield temporary
        # mkstemp makes private files; give the result the permissions that open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _temporary(folder: Path, begin: str, end: str) -> tuple[Path, int]:
    """A new file and the lock that says that somebody writes to it."""
    while True:
        lock, name = tempfile.mkstemp(dir=folder, prefix=begin, suffix=end)
        if fcntl is None:
            os.close(lock)
            return Path(name), os.open(os.devnull, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(name):
            return Path(name), lock
        # Another process took it for one that was left, before it was locked.
        os.close(lock)


@contextmanager
def output_folder(folder: Path, force: bool = False, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, else everything disappears.

    Args:
        folder: Made if it is missing, and removed again if the block fails.
        force: Whether it may hold other files.
        replaces: Globs of older output there that would contradict the new: removed when the block ends well.

    Raises:
        ValueError: Before the block, as `prepare_folder` does.
    """
    made = not folder.exists()
    with _prepared(folder, force):
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
        try:
            yield temporary
            for path in [old for name in replaces for old in folder.glob(name)]:
                path.unlink()
            for path in sorted(temporary.iterdir()):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
