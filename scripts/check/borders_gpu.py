"""What lies at the borders of launches and of autograd, on a real GPU.

    python3 -m scripts.check.borders_gpu [--only TEXT]

A position bias that learns alone, key masks made in inference mode, batches with more samples than the later axes of a
launch have room for, values that a key mask hides and that would spoil the scales of 8 bits, and tensors changed in
place between forward and backward: against float64, or against the same call without what is hidden. Exit status 1
if anything is off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from scripts.gpu_common import versions
from visattn import Layout, attention

MANY = 2**16 + 40
# Relative error, of bf16 and of float16.
LIMIT = 1.5e-2


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the GPU."""
    made = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=made, device="cuda", dtype=torch.float32).to(dtype)


def off(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error; infinite where anything is not finite."""
    ours, truth = ours.detach().double(), truth.detach().double()
    wrong = (ours - truth).norm() / truth.norm().clamp(min=1e-30)
    return float(wrong) if torch.isfinite(ours).all() else float("inf")


def bias_alone(dtype: torch.dtype, dim: int) -> float:
    """The gradient of a position bias where queries, keys and values learn nothing."""
    layout, pattern = Layout((24, 20), 5), "na(window=7x7)"
    q, k, v = (draw(2, layout.length, 3, dim, dtype=dtype, seed=i) for i in range(3))
    rpb = draw(3, 13, 13, dtype=torch.float32, seed=3)
    weight = draw(*q.shape, dtype=torch.float64, seed=4)

    def gradient(cast: Callable[[torch.Tensor], torch.Tensor], backend: str) -> torch.Tensor:
        leaf = cast(rpb).detach().requires_grad_()
        out = attention(cast(q), cast(k), cast(v), pattern, layout, rpb=leaf, backend=backend)
        return torch.autograd.grad((out.double() * weight).sum(), leaf)[0]

    truth = gradient(lambda t: t.double(), "reference")
    return max(off(gradient(lambda t: t, "triton"), truth) for _ in range(2))


def hidden_mask(pattern: str) -> float:
    """Training with a key mask that was made in inference mode: its gradients are those of a usual mask."""
    layout = Layout(300) if "causal" in pattern or pattern.startswith("topk") else Layout((20, 15))
    tensors = [draw(2, layout.length, 4, 64, seed=i) for i in range(3)]
    with torch.inference_mode():
        made = torch.rand(2, layout.length, device="cuda") > 0.3
    found = []
    for mask in (made, made.clone()):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attention(leaves[0], leaves[1], leaves[2], pattern, layout, key_mask=mask, backend="auto")
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), leaves)]))
    return off(*found)


def many(pattern: str, layout: Layout, dim: int, learned: bool = False, dtype: torch.dtype = torch.bfloat16) -> float:
    """More samples than 65,535: the last ones, forward and backward, are those of a batch of them alone."""
    tensors = [draw(MANY, layout.length, 1, dim, dtype=dtype, seed=i) for i in range(3)]
    bias = draw(1, 5, dtype=torch.float32, seed=9) if learned else None
    backend = "triton" if pattern.startswith("na(") else "auto"

    def results(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attention(leaves[0], leaves[1], leaves[2], pattern, layout, rpb=bias, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    whole, last = results(tensors), results([t[-50:].contiguous() for t in tensors])
    error = max(off(a[-50:], b) for a, b in zip(whole, last, strict=True))
    if bias is not None:
        leaf, (q, k, v) = bias.clone().requires_grad_(), tensors
        sums = []
        for parts in ((slice(None),), (slice(1000), slice(1000, None))):
            outs = [attention(q[part], k[part], v[part], pattern, layout, rpb=leaf, backend=backend) for part in parts]
            sums.append(torch.autograd.grad([out.float().square().sum() for out in outs], [leaf])[0])
        error = max(error, off(*sums))
    return error


def hidden_scales(pattern: str, precision: str, value: float) -> float:
    """What a key mask hides moves no scale of 8 bits: huge numbers there change nothing."""
    layout = Layout((64, 48), 0, 100)
    q, k, v = (draw(2, layout.length, 4, 128, seed=i) for i in range(3))
    mask = torch.ones(2, layout.length, dtype=torch.bool, device="cuda")
    mask[:, -40:] = False
    found = []
    for hidden in (value, 0.0):
        keys, values = (t.clone() for t in (k, v))
        keys[:, -40:], values[:, -40:] = hidden, -hidden
        with torch.no_grad():
            found.append(attention(q, keys, values, pattern, layout, key_mask=mask, precision=precision))
    return off(*found)


def changed(name: str, pattern: str) -> float:
    """A tensor that was changed in place between forward and backward is refused, or nothing reads it again."""
    layout = Layout((24, 20))
    made = torch.rand(1, layout.length, device="cuda") > 0.3
    found = []
    for change in (False, True):
        leaves = [draw(1, layout.length, 2, 64, seed=i).requires_grad_() for i in range(3)]
        mask = made.clone()
        out = attention(leaves[0], leaves[1], leaves[2], pattern, layout, key_mask=mask, backend="triton")
        if change:
            with torch.no_grad():
                {"mask": mask, "query": leaves[0]}[name].zero_()
        try:
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), leaves)]))
        except RuntimeError:
            return 0.0
    return off(*found)


def cases() -> dict[str, Callable[[], float]]:
    """What is tried, by name."""
    found: dict[str, Callable[[], float]] = {}
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 40)):
        found[f"a bias that learns alone, {dtype}, D {dim}"] = lambda a=dtype, b=dim: bias_alone(a, b)
    for pattern in ("na(window=7x7)", "linear", "linear(causal=true)", "agent(agents=4x4)", "mala", "topk(keep=0.3)"):
        found[f"a mask made in inference mode, {pattern}"] = lambda a=pattern: hidden_mask(a)
    found["many samples, general"] = lambda: many("na(window=3)", Layout(16), 16)
    found["many samples, general, with a bias"] = lambda: many("na(window=3)", Layout(16), 16, learned=True)
    found["many samples, Hopper"] = lambda: many("na(window=3)", Layout(128), 64)
    found["many samples, routed"] = lambda: many("topk(keep=2,block=16)", Layout(64), 32)
    found["many samples, linear"] = lambda: many("linear", Layout(16), 32)
    found["many samples, causal linear"] = lambda: many("linear(causal=true)", Layout(64), 32)
    found["many samples, agent"] = lambda: many("agent(agents=2x2)", Layout((4, 4)), 32)
    for precision in ("fp8", "int8"):
        for pattern in ("na(window=16x16,stride=8x8)", "topk(keep=0.3,block=8x16)"):
            for value in (3e4, float("nan")):
                found[f"{precision} with {value} hidden, {pattern}"] = lambda a=pattern, b=precision, c=value: (
                    hidden_scales(a, b, c)
                )
    for name in ("mask", "query"):
        for pattern in ("na(window=7x7)", "topk(keep=0.3,block=8x8)"):
            found[f"{name} changed before the backward, {pattern}"] = lambda a=name, b=pattern: changed(a, b)
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names have this text")
    given = parser.parse_args()
    print(versions(), flush=True)
    wrong = 0
    for name, case in cases().items():
        if given.only not in name:
            continue
        try:
            error, told = case(), ""
        except Exception as raised:
            error, told = float("inf"), f" ({type(raised).__name__}: {raised})"
        wrong += not error <= LIMIT
        print(f"{'ok' if error <= LIMIT else 'WRONG':<6}{name}: {error:.1e}{told}", flush=True)
    print(f"{wrong} wrong", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
