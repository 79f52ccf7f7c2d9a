"""The cases that every backend shares, who is meant to run each, and what the others say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tests.support.cases import qkv
from visattn.attend import attention
from visattn.dispatch import load
from visattn.layout import Layout
from visattn.patterns import BiasedPattern, parse
from visattn.problem import Call, Problem

CASES = {
    "dense": ("dense", Layout((7, 9), 3, 2)),
    "odd window": ("na(window=5x3)", Layout((13, 11), 1, 17)),
    "even window, stride, causal": ("na(window=4, stride=2, causal=true)", Layout(37)),
    "dilated": ("na(window=3x2, dilation=2x4)", Layout((9, 11), 2, 0)),
    "three axes": ("na(window=3x4x4, stride=1x2x2)", Layout((5, 6, 7), 0, 4)),
    "blocked": ("na(window=4x4, stride=4x4)", Layout((8, 12))),
    "whole axis": ("na(window=-1x3)", Layout((6, 8))),
    "short axis": ("na(window=9x9)", Layout((4, 20))),
    "window 1": ("na(window=1x3)", Layout((5, 1), 1)),
    "halo": ("halo(block=4x3, halo=1)", Layout((10, 9), 1, 2)),
    "clear": ("clear(radius=3)", Layout((9, 8), 0, 5)),
    "clear, pooled": ("clear(radius=3, pool=4)", Layout((9, 8), 0, 5)),
    "radial": ("radial(decay=0.5, block=16)", Layout((4, 24), 0, 6)),
    "other keys": ("na(window=3x4, stride=2x1)", Layout((8, 9), 1, 0, Layout((4, 12), 0, 5))),
    "halo, coarser keys": ("halo(block=4x3, halo=1)", Layout((10, 9), 0, 3, Layout((5, 3)))),
    "clear, finer keys": ("clear(radius=3)", Layout((5, 6), 0, 0, Layout((10, 9), 2))),
    "dense, other keys": ("dense", Layout((7, 9), 3, 2, Layout((3, 5), 1))),
    "circular": ("na(window=5x3, stride=2x1, circular=0x1)", Layout((9, 10), 1, 17)),
    "circular, dilated": ("na(window=3x2, dilation=3x2, circular=true)", Layout((9, 10), 2)),
    "circular halo": ("halo(block=4x3, halo=1x2, circular=0x1)", Layout((9, 10), 1, 2)),
    "circular clear": ("clear(radius=3, pool=4, circular=0x1)", Layout((9, 8), 0, 5)),
    "routing": ("routing(regions=3x2, topk=2)", Layout((9, 8), 1, 0)),
}
VARIANTS = ["plain", "key mask", "rpb", "gqa", "bfloat16"]


def _biased(case: str) -> bool:
    """Whether there is a position bias: only of neighborhoods, on one grid with ends."""
    text, layout = CASES[case]
    return text.startswith("na(") and "circular" not in text and layout.key_layout is None


def _drawn(case: str, variant: str) -> bool:
    """Whether a case has a variant; keys of their own and rings need no dtype of their own."""
    text, layout = CASES[case]
    if variant == "bfloat16":
        return "circular" not in text and layout.key_layout is None
    return variant != "rpb" or _biased(case)


PAIRS = [(case, variant) for case in CASES for variant in VARIANTS if _drawn(case, variant)]
BATCH, HEADS, DIM = 2, 4, 16


class Asked(NamedTuple):
    """What is asked of a backend beside its output."""

    grad: bool
    lse: bool


ASKED = [Asked(grad, lse) for grad in (True, False) for lse in (True, False)]


@dataclass(frozen=True)
class Case:
    """One case in one variant on one device."""

    case: str
    variant: str
    device: str = "cpu"

    @property
    def text(self) -> str:
        return CASES[self.case][0]

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self.text.partition("(")[0]

    @property
    def layout(self) -> Layout:
        return CASES[self.case][1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.variant == "bfloat16" else torch.float32

    @property
    def kv_heads(self) -> int:
        return HEADS // 2 if self.variant == "gqa" else HEADS

    def inputs(self, asked: Asked) -> list[torch.Tensor]:
        """q, k and v."""
        drawn = qkv(self.layout, HEADS, self.kv_heads, dim=DIM, batch=BATCH, dtype=self.dtype)
        return [t.to(self.device).requires_grad_(asked.grad) for t in drawn]

    def call(self, asked: Asked) -> Call:
        """Everything else."""
        masked, biased = self.variant == "key mask", self.variant == "rpb"
        made = call_of(self.text, self.layout, BATCH, masked, biased, HEADS, self.dtype, self.device, asked.lse)
        if made.rpb is not None:
            made.rpb.requires_grad_(asked.grad)
        return made

    def problem(self, asked: Asked) -> Problem:
        """What decides who runs it, which needs no such device here."""
        pattern, numbers = parse(self.text), (BATCH, HEADS, self.kv_heads, DIM)
        masked, biased = self.variant == "key mask", self.variant == "rpb"
        return Problem(pattern, self.layout, *numbers, self.dtype, self.device, masked, biased, *asked)


# What the backends of one kind of pattern say to any other.
OWN = {
    "agent": "it runs agent patterns only",
    "linear": "it runs linear, flow, mala and wersa only",
    "sparse_linear": "it runs sparselinear patterns only",
    "sigmoid": "it runs sigmoid patterns only",
    "wrapped": "it runs gated and selective patterns only",
    "sharing": "it runs residual and broadcast only",
    "clipped": "it runs clipped patterns only",
    "heads": "it runs patterns that differ from head to head",
    "gate": "it runs lists that trained weights choose",
    "hybrid": "it runs sla, sla2 and vsa only",
    "ordered": "it runs patterns of groups of tokens",
    "centroids": "it runs clusters around trained centroids only",
}


def refusal(backend: str, case: Case, asked: Asked) -> str:
    """What a backend is meant to say to a case, empty if it is meant to run it."""
    if case.layout.key_layout is not None and backend in (*OWN, "natten", "xformers"):
        return "it takes queries and keys of one layout only"
    if backend in OWN:
        return f"{OWN[backend]}, not {case.name}"
    if backend == "sdpa" and case.variant == "rpb":
        return "it adds no relative position bias"
    if backend == "triton" and case.device == "cpu":
        return "q is on cpu, and it runs on CUDA devices"
    if backend == "xformers":
        return _xformers(case, asked)
    if backend == "natten":
        return _natten(case, asked)
    if backend == "fa4":
        return _fa4(case, asked)
    return _flex(case, asked) if backend == "flex" else ""


def _xformers(case: Case, asked: Asked) -> str:
    if case.device == "cpu":
        return "xFormers has no operator for cpu"
    if case.variant == "rpb":
        return "its biases get no gradient that a relative position bias could use"
    if asked.lse:
        return "its public function returns no log-sum-exp"
    return "rows without any visible key are undefined in its kernels" if case.variant == "key mask" else ""


def _natten(case: Case, asked: Asked) -> str:
    if case.name != "na":
        return f"NATTEN runs na(...) only, not {case.name}"
    if case.case == "circular":
        return "NATTEN has no axes that wrap around, and axis 1 is circular"
    if case.case == "circular, dilated":
        return "NATTEN has no axes that wrap around, and axis 0 is circular"
    if case.case == "window 1":
        return "NATTEN takes windows of at least 2, and axis 0 has 1"
    if case.variant in ("key mask", "rpb"):
        return {"key mask": "NATTEN takes no key mask", "rpb": "NATTEN has no relative position bias"}[case.variant]
    return "NATTEN has no backward on a CPU" if case.device == "cpu" and asked.grad else ""


def _fa4(case: Case, asked: Asked) -> str:
    if case.name == "routing":
        return "routing computes its lists from q and k"
    if case.device == "cpu":
        return "it runs on cuda, not on cpu"
    if case.dtype == torch.float32:
        return "it computes in bfloat16 and float16, not in torch.float32"
    if asked.grad and case.name != "dense":
        return f"its backward is wrong for head dims that are no multiple of 32, like {DIM}"
    # On a machine without the package it refuses what it would run.
    return load("fa4").available().reason


def _flex(case: Case, asked: Asked) -> str:
    if case.name == "routing":
        return "routing computes its lists from q and k"
    if case.device == "cpu" and asked.grad:
        return "FlexAttention has no backward on a CPU"
    return "FlexAttention returns no log-sum-exp on a CPU" if case.device == "cpu" and asked.lse else ""


def asks(backend: str, case: Case) -> list[Asked]:
    """What a backend is meant to give for a case: with a gradient or without, with the log-sum-exp or without."""
    return [asked for asked in ASKED if not refusal(backend, case, asked)]


def call_of(text, layout, batch, key_mask, rpb, heads, dtype, device, lse):
    """A call with a random key mask, none of whose keys the first sample sees, and a random bias."""
    pattern = parse(text)
    made = torch.Generator().manual_seed(3)
    mask = None
    if key_mask:
        mask = (torch.rand(batch, layout.keys.length, generator=made) < 0.6).to(device)
        mask[0] = False
    sides = pattern.rpb_shape(layout.grid) if rpb and isinstance(pattern, BiasedPattern) else None
    bias = None if sides is None else torch.randn(heads, *sides, generator=made).to(device, dtype).requires_grad_()
    return Call(pattern, layout, 0.3, mask, bias, lse)


def results(name, q, k, v, call, grad):
    """Output, log-sum-exp with its infinities as a marker, and gradients of a random weighting of both."""
    given = {"scale": call.scale, "key_mask": call.key_mask, "rpb": call.rpb, "return_lse": call.lse}
    found = attention(q, k, v, call.pattern, call.layout, backend=name, **given)
    out, lse = found if call.lse else (found, None)
    outputs = [out] if lse is None else [out, lse.masked_fill(lse == -math.inf, 123.0)]
    if not grad:
        return outputs
    inputs = [q, k, v] if call.rpb is None else [q, k, v, call.rpb]
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(5)).to(t) for t in outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, weights))


def compare(name, q, k, v, call, grad, tolerance):
    """Assert that a backend gives what the reference gives."""
    ours, theirs = (results(n, q, k, v, call, grad) for n in (name, "reference"))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
