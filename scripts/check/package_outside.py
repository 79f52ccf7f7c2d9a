"""What must hold where only the wheel and its requirements are installed; run by scripts/check/package_use.py."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import visattn


def check_environment() -> None:
    """Only the package itself is there, whole, and none of its extras."""
    folder = Path(str(visattn.__file__)).parent
    assert folder.is_relative_to(sys.prefix), f"visattn comes from {folder}, not from this environment"
    foreign = [name for name in ("kernels", "models", "pipelines", "scripts", "tests", "docs") if find_spec(name)]
    assert not foreign, f"installed at the top level: {foreign}"
    extras = [name for name in ("diffusers", "timm", "transformers", "matplotlib", "pytest") if find_spec(name)]
    assert not extras, f"the environment is not empty: {extras}"
    links = [str(path) for path in folder.rglob("*") if path.is_symlink()]
    assert not links, f"links in the installed package: {links}"
    for room in ("kernels", "pipelines"):
        importlib.import_module(f"visattn.{room}")


def check_attention() -> None:
    """Attention is that of the mask, forward and backward, by every backend that is there."""
    layout = visattn.Layout((8, 8), prefix=6)
    q, k, v = torch.randn(3, 1, layout.length, 2, 8)
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    mask = visattn.dense_mask("na(window=3x3)", layout)
    right = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2)
    for backend in ("auto", "tiles", "sdpa", "reference"):
        given = q.clone().requires_grad_()
        out = visattn.attention(given, k, v, "na(window=3x3)", layout, backend=backend)
        assert torch.allclose(out, right, atol=1e-5), f"backend {backend} differs from masked dense attention"
        out.sum().backward()
        assert given.grad is not None and given.grad.isfinite().all(), f"backend {backend} gives no gradient"


def check_refusal() -> None:
    """A target that nothing can patch is a clear error, not an import error of a missing extra."""
    try:
        visattn.apply(torch.nn.Linear(2, 2), "na(window=3x3)")
    except ValueError as error:
        assert "pass a diffusers pipeline" in str(error), str(error)
    else:
        raise AssertionError("apply() took a Linear layer")


if __name__ == "__main__":
    check_environment()
    check_attention()
    check_refusal()
