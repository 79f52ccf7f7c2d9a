"""Schedules that ship: which run of which model is given which, what is said where there is none."""

import json
import math
import warnings

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import visattn
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn import presets
from visattn.cli import app
from visattn.pipelines.embedded import load_embedded
from visattn.presets import CAREFUL, automatic, is_auto, taken
from visattn.presets.place import Place, spans_of
from visattn.runtime import run
from visattn.staged import Span
from visattn.tuned import Tuned

VERIFIED = {
    "attention_seconds_dense": 2.0,
    "attention_seconds": 1.0,
    "psnr_mean": 33.0,
    "psnr_worst": 31.0,
    "samples": 40,
    "others": 20,
    "psnr_held": 32.0,
}
WHERE = {"grid": [16, 16], "steps": 4, "device": "a card", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pixel_flux()


def write(path, text, parameters, *elsewhere):
    layers = {layer: {"0-": text} for layer in "01"}
    alone = {name: value for name, value in VERIFIED.items() if name not in ("others", "psnr_held")}
    verified = alone | {"elsewhere": [VERIFIED | WHERE | each for each in elsewhere]}
    settings = {"subject": WHERE}
    made = Tuned("FluxTransformer2DModel", 2, (16, 16), layers, (0.5, 2.0), parameters, settings, verified)
    made.write(path)
    assert Tuned.read(path) == made


@pytest.fixture
def shipped(tmp_path, monkeypatch, pipe):
    """For the tiny pipeline a fast preset, a good one on more grids, and one that was verified on its own prompts."""
    size = sum(each.numel() for each in pipe.transformer.parameters())
    write(tmp_path / "fast.json", "topk(keep=0.2)", size, {"psnr_held": 27.0, "attention_seconds": 0.5})
    write(tmp_path / "good.json", "topk(keep=0.5)", size, {"psnr_held": 36.0}, {"grid": [8, 8], "steps": 2})
    write(tmp_path / "other.json", "topk(keep=0.3)", 7, {})
    write(tmp_path / "own.json", "topk(keep=0.1)", size)
    monkeypatch.setattr(presets, "FOLDER", tmp_path)


def patterns(schedule, steps=4, grid=(16, 16)):
    return [str(stage.pattern) for stage in schedule.staged[0].on(steps, grid).stages]


def drawn(pipe, handle, side, steps):
    pipe(prompt="red disc, flat", height=side, width=side, num_inference_steps=steps, output_type="np")
    return handle.report()


@pytest.mark.parametrize(("pattern", "keep"), [("auto", 0.5), ("auto(psnr=25)", 0.2), (" auto(psnr = 27.5) ", 0.5)])
def test_the_fastest_that_has_the_quality_is_taken_and_named(shipped, pipe, pattern, keep):
    schedule = automatic(pipe, pattern)
    assert patterns(schedule) == patterns(automatic(pipe.transformer, pattern)) == [f"topk(keep={keep})"]
    said = "fast: 95% of the samples have at least 27.0 dB to dense, in 25%"
    said = said if keep == 0.2 else "good: 95% of the samples have at least 32.0 dB to dense, in 50%"
    assert schedule.staged[0].label.startswith(f"preset {said} of the time of dense attention")
    assert schedule.label.startswith(schedule.staged[0].label) and schedule.label.endswith("; careful on others")


def test_runs_have_the_first_preset_that_was_verified_for_them(shipped, pipe):
    schedule = automatic(pipe, "auto(psnr=25)")
    found = {run: patterns(schedule, *run) for run in [(4, (16, 16)), (3, (8, 16)), (5, (16, 16)), (4, (16, 17))]}
    assert list(found.values()) == [["topk(keep=0.2)"], ["topk(keep=0.5)"], ["dense", CAREFUL], ["dense", CAREFUL]]
    careful = schedule.staged[0].choices[-1].label
    assert "are for grid 16x16 with 4 steps or grids 8x8 to 16x16 with 2 to 4 steps; `visattn tune`" in careful
    # More dB than the smaller grid has.
    assert patterns(automatic(pipe, "auto(psnr=35)"), 2, (8, 8)) == ["dense", CAREFUL]
    # One that is for no run that another is not for is not named.
    assert [each.preset.name for each in taken(presets.presets(), 30)] == ["good"]


def test_where_there_is_none_a_careful_one_says_why(shipped, pipe):
    schedule = automatic(pipe, "auto(psnr=40)")
    assert patterns(schedule) == ["dense", CAREFUL]
    assert "not measured: no preset of this model has 40 dB, the best has 36.0" in schedule.label
    # Without a pipeline there are no steps.
    assert [str(pattern) for pattern in automatic(pipe.transformer, "auto(psnr=40)").patterns] == [CAREFUL]
    assert "no preset is for AutoencoderTiny of this size" in automatic(type("AutoencoderTiny", (), {})()).label


def test_a_run_reports_which_it_was(shipped, pipe):
    with visattn.apply(pipe, "auto", always=True) as handle:
        assert "preset good" in str(handle.report()) and "careful on others" in str(handle.report())
        report = drawn(pipe, handle, 64, 2)
        assert report.hits == 4 and report.to_dict()["schedule"].startswith("preset good: 95%")
        assert "careful" not in str(report)
        # Its first quarter is dense.
        report = drawn(pipe, handle, 64, 8)
    assert report.hits == 4 + 2 * 6 and report.dense == 2 * 2
    both = report.to_dict()["schedule"]
    assert both.startswith("preset good: ") and "; careful, quality and time not measured: the presets" in both
    (steps, ran), (later, careful) = report.sites[0].stages
    assert (steps, later) == ("0-", "0.25-") and sum(c.hits for c in ran) == 2 and sum(c.hits for c in careful) == 6


def test_a_model_whose_steps_nobody_tells_runs_carefully(shipped, pipe, tmp_path):
    # One that keeps something from step to step.
    size = sum(each.numel() for each in pipe.transformer.parameters())
    write(tmp_path / "kept.json", "topk(keep=0.3, every=2, drift=inf)", size, {"attention_seconds": 0.1})
    presets._read.cache_clear()
    seen: list = []
    with (
        visattn.apply(pipe, "auto", always=True) as handle,
        pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(given[1:]), with_kwargs=True),
    ):
        assert drawn(pipe, handle, 64, 4).to_dict()["schedule"].startswith("preset kept")
    (args, given), *_ = seen
    alone = tiny_pixel_flux().transformer
    with visattn.apply(alone, "auto", always=True) as handle, torch.no_grad():
        alone(*args, **given)
        report = handle.report()
        assert [str(call.problem.pattern) for call in report.sites[0].calls] == [CAREFUL]
        assert report.schedule.startswith("careful, quality and time not measured: the presets of this model")
        # Who tells the step has the preset.
        handle.set_step(0, 4)
        alone(*args, **given)
        assert "preset kept: " in handle.report().schedule


def test_parts_in_8_bits_are_not_simulated(shipped, pipe, tmp_path):
    size = sum(each.numel() for each in pipe.transformer.parameters())
    write(tmp_path / "kept.json", "topk(keep=0.5) in fp8", size, {"attention_seconds": 0.1})
    presets._read.cache_clear()
    precisions = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with visattn.apply(pipe, "auto", always=True) as handle:
            precisions["auto"] = {call.problem.precision for call in drawn(pipe, handle, 64, 4).sites[0].calls}
    # Who passes the file has what it says.
    with (
        pytest.warns(UserWarning, match="parts in fp8, which a CPU simulates"),
        visattn.apply(pipe, tmp_path / "kept.json", always=True) as handle,
    ):
        precisions["file"] = {call.problem.precision for call in drawn(pipe, handle, 64, 4).sites[0].calls}
    assert precisions == {"auto": {None}, "file": {"fp8"}}
    # Nor are they left in where processes share attention.
    assert automatic(pipe).any_precision == "fp8" and automatic(pipe, eight_bits=False).any_precision is None
    careful = automatic(pipe, precision="int8")
    assert patterns(careful) == ["dense", CAREFUL]
    assert "no preset was verified with precision='int8'" in careful.label


def test_parts_in_8_bits_are_not_learned_through(shipped, pipe, tmp_path, monkeypatch):
    size = sum(each.numel() for each in pipe.transformer.parameters())
    write(tmp_path / "kept.json", "topk(keep=0.5) in fp8", size, {"attention_seconds": 0.1})
    presets._read.cache_clear()
    # As if this device had kernels.
    monkeypatch.setattr(run, "precisions_of", lambda device: ("fp8",))
    seen: list = []
    with pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(given[1:]), with_kwargs=True):
        pipe(prompt="red disc, flat", height=64, width=64, num_inference_steps=4, output_type="np")
    args, given = seen[0]
    found = {}
    for learns in (False, True):
        with visattn.apply(pipe.transformer, "auto", always=True) as handle, torch.set_grad_enabled(learns):
            handle.set_step(0, 4)
            pipe.transformer(*args, **given)
            found[learns] = {call.problem.precision for call in handle.report().sites[0].calls}
    assert found == {False: {"fp8"}, True: {None}}


def test_spans_have_no_run_without_the_quality():
    def place(side, steps, level=30.0, seconds=1.0):
        figures = {"psnr_held": level, "attention_seconds": seconds, "attention_seconds_dense": 2.0}
        return Place((side, side), steps, "a card", "bfloat16", figures)

    assert spans_of([place(96, 12)], 30.0) == [Span((96, 96), (96, 96), (12, 12))]
    assert spans_of([place(96, 12)], 30.1) == []
    assert spans_of([place(96, 12), place(64, 24)], 30.0) == [Span((64, 64), (96, 96), (12, 24))]
    # Prompts that it was tuned with say nothing, nor does quality that takes as long as dense attention.
    assert spans_of([place(96, 12, None)], 1.0) == [] and spans_of([place(96, 12, seconds=2.0)], 1.0) == []
    # Those that have not the quality beside it do not matter, one between those that have does.
    assert spans_of([place(96, 12), place(64, 12), place(64, 24, 29.0)], 30.0) == [Span((64, 64), (96, 96), (12, 12))]
    large, small = Span((96, 96), (96, 96), (12, 12)), Span((64, 64), (64, 64), (24, 48))
    some = [place(96, 12), place(64, 24), place(64, 48), place(64, 12, 29.0)]
    assert spans_of(some, 30.0) == [small, large]
    alone = [Span((64, 64), (64, 64), (steps, steps)) for steps in (24, 48)]
    assert spans_of([*some, place(64, 30, 29.0)], 30.0) == [large, *alone]
    # What was measured twice has to have it twice.
    assert spans_of([place(96, 12), place(96, 12, 29.0)], 30.0) == []


def test_other_texts_are_patterns():
    assert not any(is_auto(text) for text in ("autos", "topk", "auto.json", 3))
    with pytest.raises(ValueError, match=r"'auto\(psnr=x\)' must be auto, or auto\(psnr=35\) for"):
        is_auto("auto(psnr=x)")


def test_the_command_lists_them(shipped):
    listed = CliRunner().invoke(app, ["presets"])
    lines = listed.output.strip().splitlines()
    assert (
        listed.exit_code == 0 and len(lines) == 2 * 4 + 4 and lines[0].startswith("fast: FluxTransformer2DModel with 2")
    )
    assert lines[1].startswith("  grid 16x16, 4 steps: 40 samples, all of prompts that it was tuned with, PSNR 33.0 dB")
    assert lines[2] == (
        "  grid 16x16, 4 steps: 40 samples, 95% of 20 of other prompts have 27.0 dB, PSNR 33.0 dB in the mean and 31.0 "
        "at worst, attention 4.00 times faster than dense on a card in bfloat16"
    )
    found = json.loads(CliRunner().invoke(app, ["presets", "--json"]).output)
    assert [row["name"] for row in found] == ["fast", "good", "other", "own"]
    assert found[1]["verified"][1]["grid"] == [16, 16] and len(found[3]["verified"]) == 1


def test_all_that_ship_were_measured_and_are_for_a_model_that_ships():
    model = load_embedded("emoji").transformer
    size = sum(each.numel() for each in model.parameters())
    assert presets.presets()
    for preset in presets.presets():
        tuned, (first, *others) = preset.tuned, preset.places
        assert first.grid == tuned.grid and others and math.isfinite(preset.best)
        assert all(place.level and place.figures["others"] >= 20 for place in others)
        assert (tuned.model, tuned.parameters) == (type(model).__name__, size)
        assert preset.name.startswith("emoji-") and set(tuned.layers) == set(map(str, range(tuned.count)))
    # The model's own size and number of steps are among what was verified.
    assert any(each.span.has((64, 64), 24) for each in taken(presets.presets(), presets.BOUND))
