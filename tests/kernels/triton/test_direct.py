"""Kernels started without Triton's launcher: their parameters are what the PTX declares, written where they belong."""

import ctypes
import gc
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from visattn.kernels.triton import ahead, direct
from visattn.kernels.triton.config import HOPPER, config


def compiled(direction, launch):
    kernel, given = ahead.kernel_arguments(direction, torch.bfloat16, 64, launch, False)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binary = triton.compile(ahead.source(kernel, given), target=GPUTarget("cuda", 90, 32), options=options)
    return binary, given


@pytest.mark.parametrize(
    ("direction", "launch"),
    [("forward", HOPPER["forward"][64]), ("key_grad", HOPPER["key_grad"][64])]
    + [(name, config(90, torch.bfloat16, 64, name)) for name in ("forward", "query_grad")],
    ids=["hopper forward", "hopper key_grad", "forward", "query_grad"],
)
def test_every_release_of_triton_passes_what_we_expect(direction, launch):
    binary, given = compiled(direction, launch)
    wanted = direct.fields(binary.src.signature, given)
    direct.check(binary, wanted)
    assert {"q", "tokens", "bounds"} <= {field.name for field in wanted} | {"q"}
    with pytest.raises(direct.Unknown, match=r"its PTX declares parameters of \[.*\] bytes, expected"):
        direct.check(binary, wanted[1:])


def binary(**about):
    ptx = ".visible .entry f(\n.param .u64 .ptr .global .align 1 f_param_0,\n.param .u32 f_param_1,\n"
    ptx += ".param .f32 f_param_2,\n.param .u64 f_param_3,\n.param .u64 f_param_4\n)\n"
    metadata = {"num_warps": 4, "shared": 64, "global_scratch_size": 0} | about
    source = types.SimpleNamespace(signature={"x": "*fp32", "n": "i32", "scale": "fp32", "UNIT": "constexpr"})
    return types.SimpleNamespace(
        metadata=types.SimpleNamespace(**metadata), asm={"ptx": ptx}, src=source, function=0xF00
    )


@pytest.fixture
def launches(monkeypatch):
    """A driver that writes down what it is told to launch."""
    seen = []

    def launch(config, function, parameters, extra):
        about = direct.LaunchConfig.from_address(config.value)
        addresses = (ctypes.c_void_p * 5).from_address(parameters.value)
        types_ = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64)
        values = [kind.from_address(place).value for kind, place in zip(types_, addresses, strict=True)]
        shape = [getattr(about, name) for name, _ in about._fields_[:7]]
        assert not about.attributes and not about.number and not extra.value
        seen.append((function.value, shape, about.stream, values))
        return 0

    library = types.SimpleNamespace(cuLaunchKernelEx=launch, cuTensorMapReplaceAddress=None)
    monkeypatch.setattr(direct, "driver", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return seen


def test_only_addresses_change(launches):
    x, device = torch.zeros(4), types.SimpleNamespace(index=0)
    given = {"x": x, "n": 20, "scale": 0.5, "UNIT": 8}
    start = direct.Start(binary(), (3,), given, {"x": x}, {}, device)
    start([4096])
    start([8192])
    assert [(*shape, stream) for _, shape, stream, _ in launches] == [(3, 1, 1, 128, 1, 1, 64, 7)] * 2
    assert [values for *_, values in launches] == [[4096, 20, 0.5, 0, 0], [8192, 20, 0.5, 0, 0]]
    assert all(function == 0xF00 for function, *_ in launches)


def test_tensors_that_stay_are_kept_alive(launches):
    x, device = torch.zeros(4), types.SimpleNamespace(index=0)
    start = direct.Start(binary(), (3,), {"x": x, "n": 20, "scale": 0.5}, {}, {}, device)
    start([])
    assert launches[0][3][0] == x.data_ptr() and any(kept is x for kept in start.kept)


def test_tensors_that_change_are_let_go(launches):
    x, lists = torch.zeros(4), torch.zeros(2)
    given = {"x": x, "n": 20, "scale": 0.5, "copied": types.SimpleNamespace(base=x), "lists": lists}
    start = direct.Start(binary(), (3,), given, {"x": x}, {}, types.SimpleNamespace(index=0))
    held, seen = weakref.ref(x), weakref.ref(lists)
    del x, lists, given
    gc.collect()
    assert held() is None and seen() is not None
    start([4096])


@pytest.mark.parametrize(
    ("about", "reason"),
    [({"global_scratch_size": 128}, "global_scratch_size is 128"), ({"num_ctas": 2}, "num_ctas is 2"),
     ({"launch_pdl": True}, "launch_pdl is True")],
)  # fmt: skip
def test_what_needs_more_of_the_launcher_is_left_to_it(launches, about, reason):
    given = {"x": torch.zeros(4), "n": 20, "scale": 0.5}
    with pytest.raises(direct.Unknown, match=reason):
        direct.Start(binary(**about), (3,), given, {}, {}, types.SimpleNamespace(index=0))


@pytest.mark.parametrize("word", [0, 3, None])
def test_where_a_tensor_map_keeps_its_address_is_found_out(monkeypatch, word):
    def replace(place, address):
        words = (ctypes.c_uint64 * 16).from_address(place)
        words[word or 0] = address if word is not None else address ^ 0xFF
        return 0

    monkeypatch.setattr(direct, "driver", lambda: types.SimpleNamespace(cuTensorMapReplaceAddress=replace))
    given = ctypes.create_string_buffer(bytes(range(128)))
    assert direct.address_word(ctypes.addressof(given)) == word
    assert given.raw[:128] == bytes(range(128))
