"""The kernel of the hub: loads in a process without visattn, and equals the package."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from scripts.hub import build_kernel
from visattn import Layout, dense_mask, parse

# Both in one process each, as a machine without a GPU interprets the kernels only if it is told before the import.
MAKE = """
import sys, torch
from pathlib import Path
from scripts.hub.build_kernel import main
from scripts.hub.lists import make_plan
from visattn import Layout, attention
folder = Path(sys.argv[1])
main(["--out", str(folder / "kernel")])
layout = Layout((5, 7), prefix=3, suffix=2)
plan = make_plan("na(window=3x5)", layout, torch.float32, 16, torch.device("cpu"))
torch.manual_seed(0)
q, k, v = (torch.randn(1, layout.length, heads, 16, requires_grad=True) for heads in (2, 1, 1))
out, lse = attention(q, k, v, "na(window=3x5)", layout, backend="triton", return_lse=True)
weight = torch.randn_like(out)
grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
lists = {name: dict(side._asdict()) for name, side in plan._asdict().items()}
torch.save({"lists": lists, "given": [q, k, v, weight], "found": [out, lse, *grads]}, folder / "found.pt")
"""
USE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("visattn", "scripts"):
            raise ImportError(f"a kernel must not import {name}")
sys.meta_path.insert(0, Absent())
import importlib.util, json, torch
from pathlib import Path
folder = Path(sys.argv[1])
try:
    from kernels import get_local_kernel
except ImportError:
    get_local_kernel = None
if get_local_kernel is not None:
    kernel = get_local_kernel(folder / "kernel", backend="cpu")
else:
    place = folder / "kernel" / "build" / "torch-cpu"
    spec = importlib.util.spec_from_file_location(
        json.loads((place / "metadata.json").read_text())["id"], place / "__init__.py",
        submodule_search_locations=[str(place)])
    kernel = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kernel
    spec.loader.exec_module(kernel)
saved = torch.load(folder / "found.pt", weights_only=True)
plan = kernel.Plan(**{name: kernel.Lists(**side) for name, side in saved["lists"].items()})
q, k, v, weight = (t.detach().requires_grad_() for t in saved["given"])
out, lse = kernel.tile_attention(q, k, v, plan)
grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
torch.save([out, lse.transpose(1, 2), *grads], folder / "ours.pt")
print("hub" if get_local_kernel is not None else "import", "visattn" in sys.modules)
"""


def run(code, folder, **more):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run(MAKE, folder, PYTHONPATH=str(build_kernel.ROOT))
    way, loaded = run(USE, folder, PYTHONPATH=os.environ.get("VISATTN_TEST_KERNELS", ""))
    assert loaded == "False"
    # Where `kernels` is installed, its own loader is used; VISATTN_TEST_KERNELS names a folder that has it.
    assert way == "hub" or "VISATTN_TEST_KERNELS" not in os.environ
    return folder


def test_the_kernel_equals_the_package(built):
    theirs = torch.load(built / "found.pt", weights_only=True)
    ours = torch.load(built / "ours.pt", weights_only=True)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs["found"], strict=True):
        assert torch.equal(a, b), name
    q, k, v, _ = theirs["given"]
    mask = dense_mask(parse("na(window=3x5)"), Layout((5, 7), prefix=3, suffix=2))
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    assert torch.allclose(ours[0], wanted.transpose(1, 2), atol=1e-5)


def test_the_layout_is_that_of_the_hub(built):
    kernel = built / "kernel"
    for backend in build_kernel.BACKENDS:
        folder = kernel / "build" / f"torch-{backend}"
        found = json.loads((folder / "metadata.json").read_text())
        assert found["python-depends"] == [] and found["backend"] == {"type": backend} and found["version"] == 0
        sources = {path.name: path.read_text() for path in folder.glob("*.py")}
        assert sources.keys() == {"__init__.py", *build_kernel.FILES}
        assert not [name for name, text in sources.items() if "import visattn" in text or "from visattn" in text]
    assert (kernel / "torch-ext" / build_kernel.MODULE / "attention.py").is_file() and (kernel / "build.toml").is_file()
    with pytest.raises(ValueError, match="is not empty: pass another --out"):
        build_kernel.build(kernel)


def test_what_a_kernel_may_not_hold():
    with pytest.raises(ValueError, match=r"visattn\.plans is no file of the kernel"):
        build_kernel.relative("from visattn.plans import plan\n")
    with pytest.raises(ValueError, match=r"x\.py imports numpy: a kernel may import torch, triton and itself"):
        build_kernel.check("x.py", "import numpy as np\n")
    with pytest.raises(SyntaxError):
        build_kernel.check("x.py", "match x:\n    case 1: pass\n")
