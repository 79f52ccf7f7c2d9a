"""Prepared calls on a GPU: nothing waits for the device, and kept calls have the bits of first ones."""

import contextlib

import pytest
import torch

from visattn import Layout, attention, clear_caches

CASES = {
    "hopper": ("na(window=7x7)", Layout((24, 20), 5), torch.bfloat16, 64),
    "general": ("clear(radius=3)", Layout((24, 20)), torch.float32, 40),
    "routed": ("routing(regions=4x4,topk=3)", Layout((24, 20), 5), torch.float16, 64),
}


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(inputs, pattern, layout):
    out = attention(*inputs, pattern, layout, backend="triton")
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kept_calls_do_not_wait_and_have_the_bits_of_first_ones(name):
    pattern, layout, dtype, head_dim = CASES[name]
    sets = []
    for seed in range(3):
        draw = torch.Generator("cuda").manual_seed(seed)
        shape = (2, layout.length, 3, head_dim)
        inputs = [torch.randn(shape, generator=draw, device="cuda", dtype=dtype) for _ in range(3)]
        sets.append([t.requires_grad_() for t in inputs])
    first = []
    for inputs in sets:
        clear_caches()
        first.append(run(inputs, pattern, layout))
    for _ in range(2):
        for inputs, wanted in zip(sets, first, strict=True):
            with no_waiting():
                found = run(inputs, pattern, layout)
                with torch.no_grad():
                    again = attention(*inputs, pattern, layout, backend="triton")
            assert all(map(torch.equal, found, wanted))
            # Without the log-sum-exp it is another kernel of the same numbers.
            assert torch.equal(again, wanted[0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64, 8, 8), (30, 22, 5, 3)])
def test_routing_chooses_as_the_pattern_does(shape):
    from visattn import parse
    from visattn.kernels.triton.backend import kernels_of
    from visattn.problem import Call

    height, width, *regions = shape
    pattern, layout = parse(f"routing(regions={regions[0]}x{regions[1]},topk=4)"), Layout((height, width), 7)
    draw = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(2, layout.length, n, 64, generator=draw, device="cuda") for n in (4, 2))
    kernels = kernels_of(q, k, k, Call(pattern, layout, 1.0), lambda: None)
    for _ in range(2):
        chosen = kernels.lists(q, k, k, None, False)
        choice = chosen.choice()
        assert torch.equal(choice.cpu(), pattern.choose(q.double().cpu(), k.double().cpu(), layout))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_of_calls_holds_none_of_their_tensors(name):
    pattern, layout, dtype, head_dim = CASES[name]
    run([torch.randn(2, layout.length, 3, head_dim, device="cuda", dtype=dtype).requires_grad_()] * 3, pattern, layout)
    clear_caches()
    before = torch.cuda.memory_allocated()
    inputs = [torch.randn(64, layout.length, 3, head_dim, device="cuda", dtype=dtype) for _ in range(3)]
    size = inputs[0].nbytes
    run([t.requires_grad_() for t in inputs], pattern, layout)
    del inputs
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < size / 2
