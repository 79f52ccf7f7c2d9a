"""Starting a compiled kernel again with other addresses, without Triton's own launcher.

Between calls that are alike only addresses change: those of q, k, v and of the results. Everything else that a kernel
takes is written into a block once, parameters and launch configuration; a start writes the new addresses side by side
into the front of the block and calls the driver with four pointers that never change. That takes a tenth of the time of
Triton's launcher, which looks at every argument again.

How Triton passes parameters is not part of its interface (it is the same from release 3.6 to 3.9): what the kernel's
PTX declares is compared with the block first, and a kernel whose parameters differ is left to Triton.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

# Parameters by their type in a kernel's signature.
FORMATS = {
    "i1": ctypes.c_int8, "u1": ctypes.c_uint8, "i8": ctypes.c_int8, "u8": ctypes.c_uint8,
    "i16": ctypes.c_int16, "u16": ctypes.c_uint16, "i32": ctypes.c_int32, "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64, "u64": ctypes.c_uint64, "fp32": ctypes.c_float,
}  # fmt: skip
# CUtensorMap of the driver: its bytes, where it may lie, and its numbers for the dtypes that are copied.
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAP_TYPES = {torch.int8: 0, torch.float8_e4m3fn: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
L2_PROMOTION_128 = 2
POINTER, INVALID_CONTEXT = 8, 201
WORD = struct.Struct("Q")
# Two addresses that a tensor map is encoded for, to see where in it the driver keeps them.
PROBES = 0x7F1234567000, 0x7E89ABCDE000


class Unknown(Exception):
    """Why a kernel cannot be started here; Triton starts it."""


@dataclass(frozen=True)
class Field:
    """One parameter of a kernel.

    Attributes:
        name: Name of the argument it comes from.
        size: Bytes.
        kind: Its type in the signature, "map" for a tensor map, "scratch" for an address that Triton adds.
        value: What is passed unless it is an address.
    """

    name: str
    size: int
    kind: str
    value: Any = None


def fields(signature: Mapping[str, Any], given: Mapping[str, Any]) -> list[Field]:
    """The parameters of a kernel as Triton passes them: those of the signature, then two scratch addresses.

    Args:
        signature: Type of each argument; "constexpr" for those that are compiled in.
        given: Value of each argument.

    Raises:
        Unknown: If a type is none of those that the kernels of this package have.
    """
    found = []
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            raise Unknown(f"{name} is a tuple")
        if kind.startswith("*"):
            found.append(Field(name, POINTER, "pointer", given[name]))
        elif kind.startswith("tensordesc"):
            found.append(Field(name, MAP_BYTES, "map", given[name]))
            found += [Field(name, 4, "i32", n) for n in given[name].shape]
            found += [Field(name, 8, "i64", n) for n in given[name].strides]
        elif kind in FORMATS:
            found.append(Field(name, ctypes.sizeof(FORMATS[kind]), kind, given[name]))
        else:
            raise Unknown(f"{name} has type {kind}")
    return [*found, Field("global_scratch", POINTER, "scratch"), Field("profile_scratch", POINTER, "scratch")]


def declared_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter that the kernel of a PTX text declares."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise Unknown("its PTX has no entry")
    sizes = []
    for line in re.findall(r"\.param\s+([^,]+)", entry.group(1)):
        array = re.search(r"\[(\d+)\]", line)
        scalar = re.search(r"\.[bsuf](\d+)\b", line)
        if array:
            sizes.append(int(array.group(1)))
        elif scalar:
            sizes.append(int(scalar.group(1)) // 8)
        else:
            raise Unknown(f"its PTX declares {line.strip()}")
    return sizes


def check(compiled: Any, wanted: Sequence[Field]) -> None:
    """Raise Unknown unless a compiled kernel takes just these parameters and nothing else of Triton's launcher."""
    about = compiled.metadata
    for name, plain in (
        ("global_scratch_size", 0),
        ("profile_scratch_size", 0),
        ("num_ctas", 1),
        ("launch_cooperative_grid", False),
        ("launch_pdl", False),
    ):
        if getattr(about, name, plain) != plain:
            raise Unknown(f"its {name} is {getattr(about, name)}")
    declared = declared_sizes(compiled.asm["ptx"])
    if declared != [field.size for field in wanted]:
        raise Unknown(f"its PTX declares parameters of {declared} bytes, expected {[f.size for f in wanted]}")


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_uint64), ("attributes", ctypes.c_void_p), ("number", ctypes.c_uint),
    )  # fmt: skip


@lru_cache(maxsize=1)
def driver() -> Any:
    """The CUDA driver's library.

    Raises:
        Unknown: If it is not found, or too old.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.cuTensorMapEncodeTiled.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4,
        ]  # fmt: skip
    except (OSError, AttributeError) as error:
        raise Unknown(f"the CUDA driver is not usable: {error}") from error
    return library


def encode_map(place: int, descriptor: Any, about: Mapping[str, Any]) -> None:
    """Write the tensor map of a descriptor to an address of this process; `about` is what Triton compiled for it."""
    base = descriptor.base
    rank, item = len(descriptor.shape), base.element_size()
    # The driver counts axes from the last one, and strides in bytes without that of the last axis.
    sides = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
    steps = (ctypes.c_uint64 * rank)(*(item * s for s in reversed(descriptor.strides[:-1])), 0)
    box = (ctypes.c_uint32 * rank)(*reversed(about["block_size"]))
    ones = (ctypes.c_uint32 * rank)(*(1,) * rank)
    status = driver().cuTensorMapEncodeTiled(
        place, MAP_TYPES[base.dtype], rank, base.data_ptr(), ctypes.addressof(sides), ctypes.addressof(steps),
        ctypes.addressof(box), ctypes.addressof(ones), 0, about["swizzle"], L2_PROMOTION_128, 0,
    )  # fmt: skip
    if status:
        raise Unknown(f"the driver refuses its tensor map (error {status})")


def address_word(place: int) -> int | None:
    """Which 8 bytes of a tensor map are the address of its tensor, None if the driver keeps it in another form.

    Writing there is what the driver's own function does, in a tenth of the time; whether it is, is tried on a copy.
    """
    copy = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    to = -(-ctypes.addressof(copy) // MAP_ALIGNMENT) * MAP_ALIGNMENT
    ctypes.memmove(to, place, MAP_BYTES)
    words = (ctypes.c_uint64 * (MAP_BYTES // POINTER)).from_address(to)
    seen = []
    for address in PROBES:
        if driver().cuTensorMapReplaceAddress(to, address):
            return None
        seen.append(list(words))
    differ = [i for i, pair in enumerate(zip(*seen, strict=True)) if pair[0] != pair[1]]
    return differ[0] if len(differ) == 1 and tuple(each[differ[0]] for each in seen) == PROBES else None


class Start:
    """A compiled kernel with all its parameters but some addresses.

    Args:
        compiled: What Triton's first launch returned.
        grid: Number of programs, up to three axes.
        given: The arguments of that launch by name.
        changing: The tensors of that launch whose addresses change, by the names of their arguments.
        copied: Which of these a descriptor is of, by the descriptor's name.
        device: Where the kernel runs.

    Raises:
        Unknown: If the kernel cannot be started here.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        given: Mapping[str, Any],
        changing: Mapping[str, torch.Tensor],
        copied: Mapping[str, str],
        device: torch.device,
    ) -> None:
        wanted = fields(compiled.src.signature, given)
        check(compiled, wanted)
        library = driver()
        self._replace, self._launch, self._lock = library.cuTensorMapReplaceAddress, library.cuLaunchKernelEx, Lock()
        # Lists and masks of a plan, which must live as long as their addresses are here. A descriptor is of a tensor
        # that changes, and holds the first one.
        self.kept = [
            t
            for t in given.values()
            if isinstance(t, torch.Tensor) and not any(t is other for other in changing.values())
        ]
        self._index, self._device, about = device.index, device, compiled.metadata
        self._fill(wanted, changing, copied, getattr(about, "tensordesc_meta", None) or [])
        shape = (*(*grid, 1, 1)[:3], 32 * about.num_warps, 1, 1, about.shared)
        self._config = LaunchConfig(*shape)
        # Made once: the conversion of numbers to pointers takes longer than the rest of the call.
        given_to_driver = ctypes.addressof(self._config), compiled.function, ctypes.addressof(self._parameters), None
        self._arguments = tuple(ctypes.c_void_p(each) for each in given_to_driver)

    def _fill(
        self,
        wanted: Sequence[Field],
        changing: Mapping[str, torch.Tensor],
        copied: Mapping[str, str],
        maps: Sequence[Mapping[str, Any]],
    ) -> None:
        """Lay the parameters out and write all that stays; the addresses that change lie in front, in their order."""
        names = list(changing)
        front = POINTER * len(names)
        self._block = ctypes.create_string_buffer(front + sum(f.size + MAP_ALIGNMENT for f in wanted) + MAP_ALIGNMENT)
        self._write = struct.Struct(f"{len(names)}Q").pack_into
        start = ctypes.addressof(self._block)
        self._words: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int]] = []
        self._parameters = (ctypes.c_void_p * len(wanted))()
        place, described = start + front, iter(maps)
        for i, field in enumerate(wanted):
            if field.name in changing:
                self._parameters[i] = start + POINTER * names.index(field.name)
                continue
            place = -(-place // MAP_ALIGNMENT) * MAP_ALIGNMENT
            self._parameters[i] = place
            if field.kind == "map":
                role = copied[field.name]
                encode_map(place, field.value, next(described))
                behind, word = field.value.base.data_ptr() - changing[role].data_ptr(), address_word(place)
                if word is None:
                    self._maps.append((names.index(role), behind, place))
                else:
                    self._words.append((names.index(role), behind, place - start + POINTER * word))
            elif field.kind in ("pointer", "scratch"):
                address = 0 if field.value is None else field.value.data_ptr()
                ctypes.c_uint64.from_buffer(self._block, place - start).value = address
            else:
                FORMATS[field.kind].from_buffer(self._block, place - start).value = field.value
            place += field.size

    def __call__(self, addresses: Sequence[int]) -> None:
        """Start the kernel on the current stream of its device: an address for each that changes, in their order."""
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                return self(addresses)
        with self._lock:
            block = self._block
            self._write(block, 0, *addresses)
            for i, behind, place in self._words:
                WORD.pack_into(block, place, addresses[i] + behind)
            for i, behind, place in self._maps:
                self._replace(place, addresses[i] + behind)
            self._config.stream = torch._C._cuda_getCurrentRawStream(self._index)
            status = self._launch(*self._arguments)
            if status == INVALID_CONTEXT:
                # A thread that has not used the device yet.
                torch.cuda.set_device(self._index)
                status = self._launch(*self._arguments)
        if status:
            raise RuntimeError(f"the CUDA driver could not start a kernel: error {status}")
        return None
