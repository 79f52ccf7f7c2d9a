"""The package flash-attn-4: whether it is here, its functions, and what compiling its kernels took."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visattn.files import add_values, cache_folder, read_values
from visattn.problem import Support

# What its function must take; the version that has been read and tried (pyproject.toml).
NEEDED = ("mask_mod", "aux_tensors", "block_sparse_tensors", "block_sparse_tensors_bwd", "return_lse", "pack_gqa")
TRIED = "4.0.0b36"
# Its kernels with lists of blocks: Hopper, and both generations of Blackwell data centre GPUs.
ARCHITECTURES = (9, 10, 11)
# Whether it keeps compiled kernels between processes.
KEEPS = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


class Package(NamedTuple):
    """What is used of it.

    Attributes:
        attend: `flash_attn_func`.
        lists: `BlockSparseTensorsTorch`.
    """

    attend: Any
    lists: Any


@lru_cache(maxsize=1)
def version() -> str | None:
    """The version that is installed; nothing is imported for that."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def generation() -> int:
    """First number of the compute capability of the current CUDA device, 9 where there is none to ask."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


def here() -> Support:
    """Whether the package is installed and imports, and the GPU has its kernels."""
    if version() is None:
        return Support(False, "flash-attn-4 is not installed (pip install visattn[fa4])")
    if not torch.cuda.is_available():
        return Support(False, "FlashAttention-4 has kernels for CUDA alone, and there is no CUDA device")
    if generation() not in ARCHITECTURES:
        major, minor = torch.cuda.get_device_capability()
        return Support(
            False, f"its kernels take lists of blocks on Hopper and Blackwell alone, not on sm_{major}{minor}"
        )
    found, reason = load()
    return Support(found is not None, reason)


@lru_cache(maxsize=1)
def load() -> tuple[Package | None, str]:
    """The package, or None and why not; its compiled kernels are kept in our folder unless the user says where."""
    # A variable alone says so, which is read on import.
    if "flash_attn.cute" not in sys.modules and KEEPS not in os.environ:
        with suppress(OSError):
            folder().mkdir(parents=True, exist_ok=True)
            os.environ[KEEPS] = "1"
            os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder()))
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        missing = [name for name in NEEDED if name not in inspect.signature(interface.flash_attn_func).parameters]
    except Exception as error:  # Another version of what it stands on fails in many ways.
        return None, f"flash-attn-4 {version()} does not import: {type(error).__name__}: {error}"
    if missing:
        return None, f"flash-attn-4 {version()} takes no {', '.join(missing)}: install {TRIED}"
    return Package(interface.flash_attn_func, lists), ""


def folder() -> Path:
    """Where its compiled kernels are kept."""
    return cache_folder() / "fa4"


def _record() -> Path:
    return folder() / "compiled.json"


@contextmanager
def compiling(kernel: str) -> Iterator[None]:
    """Remember how long the first call of a kernel took, most of which is the compiler."""
    began = time.perf_counter()
    yield
    name = f"{version()}: {kernel}"
    if name not in compiled():
        # A folder that cannot be written costs the note, not the call.
        with suppress(OSError):
            add_values(_record(), {name: round(time.perf_counter() - began, 1)})


def compiled() -> dict[str, float]:
    """Seconds that the first call of each kernel took on this machine, by version and kernel."""
    return read_values(_record())
