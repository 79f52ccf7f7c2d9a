"""What commands refuse before they import torch or diffusers, which a typo should not wait for."""

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")

HEAVY = "torch", "diffusers"
# Runs a command and tells which heavy libraries it has imported by then.
TELL = f"""
import sys
from visattn.cli import main
try:
    main()
except SystemExit as ended:
    print(ended.code, *(name for name in {HEAVY} if name in sys.modules))
"""


def refused(*args):
    """Status, heavy libraries that were imported, and the error."""
    done = subprocess.run([sys.executable, "-c", TELL, *args], capture_output=True, text=True, timeout=120)
    status, *heavy = done.stdout.split()
    return int(status), heavy, done.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("generate image", "emoji needs a prompt: pass --prompt TEXT"),
        ("generate image --prompt x --model emojy", "model 'emojy' is not an embedded model (digits, "),
        ("generate image --prompt x --model animoji", "animoji makes videos: use visattn generate video"),
        ("generate video --prompt x --model emoji", "emoji makes images: use visattn generate image"),
        ("generate image --label 3", "emoji takes a prompt and no class labels: pass --prompt TEXT instead of --label"),
        ("generate image --prompt x --model digits", "digits takes class labels and no prompt: pass --label 3"),
        ("generate image --prompt x --dtype fp16", "dtype 'fp16' does not exist here: pass one of float32, bfloat16"),
        ("generate image --prompt x --steps 0", "--steps 0 must be at least 1"),
        ("generate image --prompt x --prompt y --count 1", "--count 1 is less than the 2 of --prompt: leave it out"),
        ("generate image --model digits --label 1,2,3 --count 2", "--count 2 is less than the 3 of --label"),
        ("generate image --prompt x --size 65", "height 65 is not a multiple of the patch size 4: pass e.g. 64"),
        ("generate image --prompt x --guidance nan", "guidance nan must be a finite number, like 4.5"),
        ("generate video --prompt x --frames 0", "--frames 0 must be at least 1"),
        ("generate video --prompt x --fps 0", "--fps 0 must be at least 1"),
        ("generate video --prompt x --fps 1001", "--fps 1001 must be from 1 to 1000"),
        (f"generate image --prompt x --seed {2**64}", f"--seed {2**64} must be from {-(2**63)} to {2**64 - 1}"),
        (f"generate image --model digits --seed {2**64 - 1} --count 2", f"--seed {2**64 - 1} must be from {-(2**63)} "),
        (f"record --prompt x --out x.safetensors --seed {2**64}", f"--seed {2**64} must be from "),
        ("generate image --model digits --label 0-100000", "--label '0-100000' has more than 100000 numbers"),
        ("record --prompt x --out x.safetensors --model emojy", "model 'emojy' is not an embedded model"),
        ("record --out x.safetensors", "emoji needs a prompt"),
        ("tune --prompt x --psnr 30 --out x.json --model emojy", "model 'emojy' is not an embedded model"),
        ("tune --prompt x --psnr 30 --out x.json --steps 0", "--steps 0 must be at least 1"),
    ],
)
def test_what_needs_no_library_is_refused_without_any(args, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, heavy, err = refused(*args.split())
    assert (status, heavy) == (2, []), err
    assert err.startswith(f"visattn: {text}"), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--pattern", "topc(keep=0.2)"), "unknown pattern 'topc' (did you mean 'topk' or 'topp'?)"),
        (("--pattern", "tuned.json"), "pattern file 'tuned.json' does not exist: `visattn tune` writes"),
        (("--backend", "trition"), "unknown backend 'trition'; backends: auto, triton"),
        (("--dense-steps", "1.5"), "dense_steps=1.5 must be a count of steps like 12 or a fraction like 0.25"),
        (("--device", "gpu"), "device 'gpu' cannot be used on this machine (torch has none of this name): pass one"),
        (("--weights", "none.safetensors"), "none.safetensors does not exist: name a student"),
    ],
)
def test_what_needs_torch_is_refused_without_diffusers(args, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, heavy, err = refused("generate", "image", "--prompt", "x", *args)
    assert (status, heavy) == (2, ["torch"]), err
    assert err.startswith(f"visattn: {text}"), err
    assert not list(tmp_path.iterdir())
