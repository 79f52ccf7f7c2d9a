"""Schedules that ship: which model is given which, what is said where there is none."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import visattn
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn import presets
from visattn.cli import app
from visattn.presets import CAREFUL, automatic, is_auto
from visattn.tuned import Tuned

VERIFIED = {
    "attention_seconds_dense": 2.0,
    "attention_seconds": 1.0,
    "psnr_mean": 33.0,
    "psnr_worst": 31.0,
    "samples": 20,
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pixel_flux()


@pytest.fixture
def shipped(tmp_path, monkeypatch, pipe):
    """Presets of 25 and 35 dB for the tiny pipeline, and one of another size."""
    size = sum(each.numel() for each in pipe.transformer.parameters())
    for name, keep, bound, parameters in (("a-25", 0.2, 25.0, size), ("a-35", 0.5, 35.0, size), ("b-30", 0.3, 30.0, 7)):
        layers = {layer: {"0-": f"topk(keep={keep})"} for layer in "01"}
        settings = {"goal": {"psnr": bound}, "subject": {"device": "a card", "steps": 12}}
        made = Tuned("FluxTransformer2DModel", 2, (16, 16), layers, (0.5, 2.0), parameters, settings, VERIFIED)
        made.write(tmp_path / f"{name}.json")
        assert Tuned.read(tmp_path / f"{name}.json") == made
    monkeypatch.setattr(presets, "FOLDER", tmp_path)


def patterns(schedule):
    return [str(pattern) for pattern in schedule.patterns]


@pytest.mark.parametrize(("pattern", "keep"), [("auto", 0.5), ("auto(psnr=25)", 0.2), (" auto(psnr = 25.5) ", 0.5)])
def test_the_fastest_that_has_the_quality_is_taken_and_named(shipped, pipe, pattern, keep):
    schedule = automatic(pipe, pattern)
    assert patterns(schedule) == [f"topk(keep={keep})"] and patterns(automatic(pipe.transformer, pattern)) == patterns(
        schedule
    )
    assert (
        f"preset a-{25 if keep == 0.2 else 35}" in schedule.label
        and "2.00 times faster than dense on a card" in schedule.label
    )


def test_where_there_is_none_a_careful_one_says_why(shipped, pipe):
    schedule = automatic(pipe, "auto(psnr=40)")
    assert patterns(schedule) == ["dense", CAREFUL]
    assert "not measured: no preset of this model has 40 dB, the best has 35" in schedule.label
    # Without a pipeline there are no steps.
    assert patterns(automatic(pipe.transformer, "auto(psnr=40)")) == [CAREFUL]
    assert "no preset is for AutoencoderTiny of this size" in automatic(type("AutoencoderTiny", (), {})()).label


def test_a_run_reports_which_it_was(shipped, pipe):
    with visattn.apply(pipe, "auto", always=True) as handle:
        pipe(prompt="red disc, flat", height=64, width=64, num_inference_steps=2, output_type="np")
        report = handle.report()
    assert report.hits == 4 and "preset a-35" in str(report) and report.to_dict()["schedule"].startswith("preset a-35")


def test_other_texts_are_patterns():
    assert not any(is_auto(text) for text in ("autos", "topk", "auto.json", 3))
    with pytest.raises(ValueError, match=r"'auto\(psnr=x\)' must be auto, or auto\(psnr=35\) for"):
        is_auto("auto(psnr=x)")


def test_the_command_lists_them(shipped):
    listed = CliRunner().invoke(app, ["presets"])
    assert listed.exit_code == 0 and len(listed.output.strip().splitlines()) == 3 and "b-30" in listed.output
    found = json.loads(CliRunner().invoke(app, ["presets", "--json"]).output)
    assert [row["bound"] for row in found] == [25.0, 35.0, 30.0] and found[0]["verified"]["samples"] == 20


def test_all_that_ship_were_measured_and_hold():
    for preset in presets.presets():
        figures = preset.tuned.verified
        assert figures["held"] and figures["samples"] >= 20 and figures["attention_seconds"] > 0
        assert preset.tuned.parameters and preset.name.endswith(f"-{preset.bound:g}")
