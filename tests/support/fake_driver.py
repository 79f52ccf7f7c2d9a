"""A CUDA driver that writes down what it is told to launch: prepared calls run on the CPU, their kernels do nothing."""

import contextlib
import ctypes
import types
from unittest import mock

import torch

from visattn.problem import Support

SIZES = {"*fp32": 8, "i32": 4, "fp32": 4}
TYPES = {8: ctypes.c_uint64, 4: ctypes.c_int32}


def _kind(parameter, value):
    if parameter.is_constexpr:
        return "constexpr"
    if hasattr(value, "block_shape"):
        return "tensordesc"
    return "*fp32" if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


def _compiled(kernel, given):
    """What Triton would return, with a function number of its own."""
    from visattn.kernels.triton.direct import fields

    signature = {p.name: _kind(p, given[p.name]) for p in kernel.params}
    wanted = fields(signature, given)
    declared = ",\n".join(f".param .align 64 .b8 p{i}[{field.size}]" for i, field in enumerate(wanted))
    maps = [{"block_size": d.block_shape, "swizzle": 3} for d in given.values() if hasattr(d, "block_shape")]
    about = types.SimpleNamespace(num_warps=4, shared=64, tensordesc_meta=maps)
    source = types.SimpleNamespace(signature=signature)
    number = FUNCTIONS.setdefault(kernel.fn.__qualname__ + kernel.fn.__module__, len(FUNCTIONS) + 1)
    return types.SimpleNamespace(metadata=about, asm={"ptx": f".entry f({declared})"}, src=source, function=number)


FUNCTIONS = {}
ADDRESS = torch.Tensor.data_ptr


class Launches(list):
    """What was launched: (kernel, its parameters by name); first launches of a kernel are in `first`, how many
    programs they had in `grids`. `memory` is what was asked for its address: held, so that none of it is used again."""

    def __init__(self):
        super().__init__()
        self.first, self.grids, self.wanted, self.memory, self.quiet = [], [], {}, {}, False

    def address(self, tensor):
        """Stands for `Tensor.data_ptr`."""
        if not self.quiet:
            storage = tensor.untyped_storage()
            self.memory[storage.data_ptr()] = storage
        return ADDRESS(tensor)

    def check_held(self, name, address):
        """What a kernel is told to use is somebody's until it is in the queue, or a later tensor may lie there too."""
        for first, storage in self.memory.items():
            if first <= address < first + storage.nbytes():
                # One of these is `memory`.
                assert torch._C._storage_Use_Count(storage._cdata) > 1, f"{name} was freed before its kernel began"

    def by_triton(self, kernel, grid, given, warps, stages):
        """Stands for `start.launch`."""
        from visattn.kernels.triton.direct import fields

        compiled = _compiled(kernel, given)
        self.wanted[compiled.function] = kernel, fields(compiled.src.signature, given)
        self.first.append((kernel, given))
        self.grids.append(grid)
        return compiled

    def by_driver(self, config, function, parameters, extra):
        """Stands for cuLaunchKernelEx."""
        if self.quiet:
            return 0
        kernel, wanted = self.wanted[function.value]
        places = (ctypes.c_void_p * len(wanted)).from_address(parameters.value)
        found = {}
        for field, place in zip(wanted, places, strict=True):
            kind = ctypes.c_uint64 if field.kind == "map" or field.size == 8 else ctypes.c_int32
            kind = ctypes.c_float if field.kind == "fp32" else kind
            found.setdefault(field.name, kind.from_address(place).value)
            if field.kind in ("map", "pointer"):
                self.check_held(field.name, kind.from_address(place).value)
        self.append((kernel, found))
        return 0


def _replace(place, address):
    ctypes.c_uint64.from_address(place).value = address
    return 0


def _encode(place, dtype, rank, address, *rest):
    return _replace(place, address)


@contextlib.contextmanager
def fake_driver(architecture=90):
    """The Triton backend as on a GPU of that architecture, for tensors on the CPU."""
    from visattn.kernels.triton import backend, direct, start

    seen = Launches()
    library = types.SimpleNamespace(
        cuLaunchKernelEx=seen.by_driver, cuTensorMapReplaceAddress=_replace, cuTensorMapEncodeTiled=_encode
    )
    properties = types.SimpleNamespace(multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (direct, "driver", lambda: library),
            (start, "launch", seen.by_triton),
            (start, "startable", lambda device: True),
            (backend, "architecture", lambda device=None: architecture),
            (backend, "_architecture_or_common", lambda: architecture),
            (backend, "fits", lambda device, dtype, head_dim: Support(True)),
            (backend.Triton, "available", lambda self: Support(True)),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.Tensor, "data_ptr", lambda tensor: seen.address(tensor)),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        for name, value in (("_cuda_getDevice", lambda: None), ("_cuda_getCurrentRawStream", lambda index: 7)):
            stack.enter_context(mock.patch.object(torch._C, name, value, create=True))
        yield seen
