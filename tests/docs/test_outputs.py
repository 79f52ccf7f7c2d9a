"""Reports that pages and their pictures show are those that are printed today, whatever the times in them."""

import contextlib
import io
import re

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import visattn
from scripts.pages import ROOT, blocks
from scripts.terminal import shown
from tests.support import dinov2_run, flux_run, modular_run
from tests.support.tiny_flux import flux
from tests.support.tiny_videos import wan

PICTURES = ROOT / "docs" / "pictures"
PROGRAMS = {"modular_run": modular_run, "dinov2_run": dinov2_run, "flux_run": flux_run}


def timeless(lines):
    """Lines without times, and without the backends that this machine lacks."""
    times = (re.sub(r"\d+\.\d+ s\b", "... s", line.rstrip()) for line in lines)
    return [line for line in times if line and not re.match(r"    \w+: ", line)]


def printed(program, *arguments, monkeypatch):
    """What a program of tests/support prints."""
    monkeypatch.setattr("sys.argv", [program, *map(str, arguments)])
    # Estimates are those of the threads that a call has: two, as on the machine that wrote pages and pictures.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            PROGRAMS[program].main()
    finally:
        torch.set_num_threads(threads)
    return said.getvalue().splitlines()


def reported(model, inputs, pattern, steps, **options):
    """The report of some denoising steps of a model."""
    with torch.no_grad(), visattn.apply(model, pattern, backend="tiles", **options) as handle:
        for step in range(steps):
            handle.set_step(step, steps)
            model(**inputs)
        return str(handle.report()).splitlines()


@pytest.mark.crossing
def test_the_report_of_the_page_is_that_of_its_program(monkeypatch):
    page = ROOT / "docs" / "diffusers.md"
    (report,) = (block.code for block in blocks(page) if "attention modules ran a pattern" in block.code)
    assert timeless(report.splitlines()) == timeless(printed("flux_run", monkeypatch=monkeypatch))


@pytest.mark.crossing
@pytest.mark.parametrize(
    ("picture", "program", "arguments"),
    [("modular.svg", "modular_run", ()), ("transformers.svg", "dinov2_run", ("transformers.png",))],
)
def test_pictures_of_programs_show_what_they_print(picture, program, arguments, tmp_path, monkeypatch):
    said = printed(program, *(tmp_path / name for name in arguments), monkeypatch=monkeypatch)
    assert timeless(shown(PICTURES / picture)[1:]) == timeless(said)


@pytest.mark.parametrize("picture", ["sglang.svg", "vllm-omni.svg"])
def test_pictures_of_servers_show_reports_as_they_are(picture):
    # Their tiny Wan needs SGLang or vLLM-Omni; that of diffusers has as many layers, tokens and steps.
    model, inputs = wan(frames=3, height=16, width=20, layers=3)
    said = reported(model, inputs, "na(window=3x5x5)", 2, dense_steps=1)
    assert timeless(shown(PICTURES / picture)[2:]) == timeless(said)


def test_the_picture_of_comfyui_shows_a_report_as_it_is():
    # Its tiny FLUX needs ComfyUI; two modules of that of diffusers have as many tokens.
    model, inputs = flux(text=7)
    said = [
        line.replace("single_transformer_blocks.0-1.attn", "attention.0-1")
        for line in reported(model, inputs, "na(window=3)", 3, layers="1-2")
    ]
    with Image.open(PICTURES / "comfyui.png") as picture:
        assert timeless(picture.text["Report"].splitlines()) == timeless(said)
