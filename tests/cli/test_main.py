"""The command line as a user meets it: subprocesses for start-up and streams, `main()` in process for the rest."""

import importlib.metadata
import json
import os
import stat
import subprocess
import sys
import time

import pytest
from PIL import Image
from typer.main import get_command

import visattn
from tests.support.forks import in_forks
from visattn.cli import SUMMARIES, app


@pytest.fixture
def run(command):
    return command


def process(*args):
    command = [sys.executable, "-c", "from visattn.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# A command, and before it what makes a library look as if it were not installed.
COMMAND = """
import os, sys
if "ABSENT" in os.environ:
    sys.modules[os.environ["ABSENT"]] = None
sys.argv[0] = "visattn"
from visattn.cli import main
main()
"""
UNKNOWN = ("simulate", "neighbor(3x3)", "--grid", "8x8")
UNKNOWNS = [(UNKNOWN, {}), ((*UNKNOWN, "--debug"), {}), (UNKNOWN, {"VISATTN_DEBUG": "1"})]
ABSENT = [
    ("timm", ("bench-model", "vit_tiny_patch16_224", "--pattern", "dense")),
    ("diffusers", ("record", "--prompt", "x", "--out", "x.safetensors")),
]
OTHERS_ABSENT = [
    ("timm", ("models",)),
    ("timm", ("doctor", "--model", "vit_tiny_patch16_224")),
    ("diffusers", ("maps", "emoji", "--prompt", "x")),
    ("diffusers", ("tune", "--prompt", "x", "--psnr", "30", "--out", "x.json")),
]


def commands(unknowns, absent):
    calls = [*unknowns, *((words, {"ABSENT": library}) for library, words in absent)]
    return in_forks("import torch, visattn.cli, visattn.patterns", COMMAND, calls)


@pytest.fixture(scope="module")
def ended():
    """How commands ended that are wrong, or whose library is not there."""
    return commands(UNKNOWNS, ABSENT)


def test_help_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = process("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    for command in ("generate", "doctor", "show", "simulate", "bench"):
        assert command in done.stdout
    assert min(times) < 0.7
    heavy = "('torch', 'numpy', 'rich', 'PIL', 'diffusers')"
    code = f"import sys, visattn.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr


@pytest.mark.parametrize("words", [("--help",), ("generate", "--help")])
def test_every_command_is_told_in_a_whole_sentence(run, words):
    """What newcomers look for stands first, and no summary is cut by the width of a terminal."""
    listed = run(*words)[1].split("Commands:\n")[1].splitlines()
    assert listed[0].split()[0] == ("generate" if len(words) == 1 else "image")
    assert all(line.startswith("  ") and line.endswith(".") and not line.endswith("..") for line in listed)
    if len(words) == 1:
        assert [line.split()[0] for line in listed] == [*SUMMARIES] and set(SUMMARIES) == set(get_command(app).commands)


def test_version_and_no_arguments(run):
    assert run("--version") == (0, f"visattn {visattn.__version__}\n", "")
    assert "Usage: visattn" in "".join(run()[1:])


def test_an_error_is_one_line_on_stderr_and_status_2(ended):
    done = ended[0]
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("visattn: unknown pattern 'neighbor'")
    assert done.stderr.count("\n") == 1


def told_to_install(library, done):
    line = f"visattn: this needs {library}, which is not installed: pip install 'visattn[{library}]'\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not done.left


@pytest.mark.parametrize("i", range(len(ABSENT)), ids=lambda i: ABSENT[i][0])
def test_a_library_that_is_not_installed_is_a_line(ended, i):
    told_to_install(ABSENT[i][0], ended[len(UNKNOWNS) + i])


@pytest.mark.slow
def test_a_library_that_is_not_installed_is_a_line_of_every_command():
    for (library, _), done in zip(OTHERS_ABSENT, commands([], OTHERS_ABSENT), strict=True):
        told_to_install(library, done)


@pytest.mark.parametrize("i", [1, 2], ids=["option", "variable"])
def test_debug_shows_the_traceback(ended, i):
    done = ended[i]
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: unknown pattern" in done.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("simulate", "dense", "--grid", "8x-8"), "--grid '8x-8' must be 1 to 3 whole numbers of at least 1, like"),
        (("simulate", "dense", "--grid", "8x8x8x8"), "--grid '8x8x8x8' must be 1 to 3 whole numbers"),
        (("simulate", "dense", "--grid", "8x8", "--tile", "4y4"), "--tile '4y4' must be 1 to 3 whole numbers"),
        (("simulate", "dense", "--grid", "8x8", "--tile", "4x4x4"), "does not fit grid (8, 8): pass 2 whole numbers"),
        (("simulate", "na(window=3x3x3)", "--grid", "8x8"), "has 3 values but the grid has 2 axes"),
        (("simulate", "dense", "--grid", "8x8", "--prefix", "-1"), "must be whole numbers of at least 0"),
        (("simulate", "dense", "--grid", "8x8", "--gpu", "v100"), "gpu 'v100' has no record: pass one of h100, h200"),
        (
            ("simulate", "dense", "--grid", "8x8", "--advise"),
            "only na(...) has a stride to advise on; dense has none: pass a window, or ask for no advice",
        ),
        (("show", "dense", "--grid", "8x8", "--query", "a,b"), "--query 'a,b' must be one index per axis with commas"),
        (
            ("show", "dense", "--grid", "8x8", "--query", "8,0"),
            "query 8,0 is not on grid 8x8: pass 2 indices up to 7,7",
        ),
        (("show", "dense", "--grid", "8x8", "--out", "mask.jpg"), "mask.jpg must end in .png"),
        (("show", "dense", "--grid", "8x8", "--out", "no/mask.png"), "folder no does not exist: make it first"),
        (("show", "dense", "--grid", "8x8", "--out", "there.png"), "there.png is a folder: name a file in it"),
    ],
)
def test_bad_input(run, monkeypatch, tmp_path, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").mkdir()
    status, out, err = run(*args)
    assert status == 2
    assert out == ""
    assert err.startswith("visattn: ")
    assert text in err
    assert not (tmp_path / "mask.png").exists()


def test_doctor_names_versions_devices_and_backends(run):
    status, out, _ = run("doctor")
    assert status == 0
    import torch

    for text in ("python", importlib.metadata.version("torch"), "backend sdpa", "cpu"):
        assert text in out
    shown = " ".join(out.split())
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    # What stands in brackets is no markup.
    reason = found["backends"]["fa4"]["reason"]
    assert not reason or reason.split("install ")[-1] in shown
    assert found["versions"]["torch"]
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert set(found["backends"]) == set(visattn.backends())
    assert all(b["available"] or b["reason"] for b in found["backends"].values())


def test_simulate_prints_text_or_pure_json(run):
    args = ("simulate", "na(window=15x15)", "--grid", "64x64", "--suffix", "7")
    status, out, _ = run(*args)
    assert status == 0
    result = visattn.plan("na(window=15x15)", visattn.Layout((64, 64), suffix=7))
    for text in (f"{result.density:.2%}", f"{result.flop_bound:.2f}x", f"{result.tile_bound:.2f}x", "suffix 7", "8x8"):
        assert text in out
    found = json.loads(run(*args, "--json")[1])
    assert found["density"] == result.density
    assert found["masks"] == len(result.masks)
    found = json.loads(run(*args, "--tile", "8x8:4x4", "--json")[1])
    assert (found["query_tile"], found["key_tile"]) == ([8, 8], [4, 4])


def test_simulate_advises(run):
    args = ("simulate", "na(window=16x16)", "--grid", "64x64", "--advise")
    out = run(*args)[1]
    assert "now" in out
    assert "100.0%" in out
    # What the pattern leaves out is told too.
    assert "of all query-key pairs are visible" in out and "full: visited tile pairs that need no mask" in out
    found = json.loads(run(*args, "--json")[1])
    assert found["better"][0]["full_share"] == 1
    assert "no tile fits this window" in run("simulate", "na(window=15x15)", "--grid", "64x64", "--advise")[1]


def test_show_writes_a_picture_and_overwrites_only_when_told(run, tmp_path):
    out = tmp_path / "mask.png"
    args = ("show", "na(window=5x5)", "--grid", "16x16", "--prefix", "1", "--out", out)
    status, printed, _ = run(*args)
    assert status == 0
    assert str(out) in printed
    assert Image.open(out).width > 500
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o400
    out.write_bytes(b"precious")
    status, _, err = run(*args)
    assert status == 2
    assert f"{out} exists: pass --force to overwrite it" in err
    assert out.read_bytes() == b"precious"
    assert run(*args, "--force")[0] == 0
    assert Image.open(out).width > 500


def test_a_busy_machine_is_named(monkeypatch):
    from visattn.environment import busy

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 9.0, 9.0), raising=False)
    assert busy() == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (16.38, 1.0, 1.0), raising=False)
    assert busy().startswith("the machine was busy (load 16.4 on 2 cores)")


def test_keys_have_a_grid_of_their_own(run):
    args = ("simulate", "na(window=3x3)", "--grid", "16x16", "--key-grid", "4x4", "--key-suffix", "3")
    found = json.loads(run(*args, "--json")[1])
    assert found["key_layout"] == "4x4, suffix 3" and found["density"] == pytest.approx(12 / 19)
    assert "4x4, suffix 3" in run(*args)[1] and "advice is for one sequence" in run(*args, "--advise")[1]
    status, _, err = run(*args[:4], "--key-suffix", 3)
    assert status == 2 and "pass --key-grid as well" in err
