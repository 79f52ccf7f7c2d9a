"""`visattn tune` and `visattn show` of what it writes."""

import json
import types

import pytest
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn.cli import app
from visattn.cli.tune import _say
from visattn.tuned import Tuned
from visattn.tuning.goal import Goal

SETTINGS = ("--steps", "2", "--size", "64", "--stages", "1", "--seeds", "1", "--held-out", "2", "--batch", "2")


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Runs the command on a tiny model in a folder with prompts and candidates."""
    monkeypatch.setattr("visattn.pipelines.load.load_pipeline", lambda *_: tiny_pixel_flux())
    # The tiny model runs dense attention faster than anything else.
    monkeypatch.setattr("visattn.pipelines.tuning.local.HOPELESS", float("inf"))
    monkeypatch.setattr("visattn.tuning.layers.promising", lambda layers, names: names)
    (tmp_path / "prompts.txt").write_text("red disc, flat\n\nblue bar, 3d\n")
    (tmp_path / "candidates.txt").write_text("topk(keep=0.5, rest=mean)\n")

    def run(*arguments):
        files = ("--prompts", tmp_path / "prompts.txt", "--candidates", tmp_path / "candidates.txt")
        words = ["tune", "--out", tmp_path / "tuned.json", *files, *SETTINGS, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def test_it_writes_a_schedule_a_page_and_a_journal_that_goes_on(tune, tmp_path):
    done = tune("--psnr", "15")
    assert done.exit_code == 0, done.output
    assert "held-out samples" in done.output or "no candidate is faster" in done.output
    # One sample is searched with, of the first of two prompts.
    assert "others may have less" not in done.output
    found = Tuned.read(tmp_path / "tuned.json")
    assert found.model == "FluxTransformer2DModel" and found.grid == (16, 16) and found.count == 2
    assert found.verified["samples"] == 2
    lines = (tmp_path / "tuned.jsonl").read_text().splitlines()
    page = (tmp_path / "tuned.html").read_text()
    assert page.startswith("<!doctype html>") and "layer 0, steps" in page
    # All is known: the same words give the same file.
    before = (tmp_path / "tuned.json").read_text()
    again = tune("--psnr", "15", "--force")
    assert again.exit_code == 0 and (tmp_path / "tuned.json").read_text() == before
    assert (tmp_path / "tuned.jsonl").read_text().splitlines() == lines
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "tuned.json")])
    assert shown.exit_code == 0 and "layer" in shown.output and json.dumps(found.verified["samples"]) in shown.output


def test_ctrl_c_says_that_nothing_is_lost(tune, tmp_path, monkeypatch):
    from visattn.pipelines.tuning.subject import PipelineSubject

    real, calls = PipelineSubject.outcome, []

    def outcome(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(PipelineSubject, "outcome", outcome)
    stopped = tune("--psnr", "15")
    assert stopped.exit_code == 130 and "goes on behind the last line of" in stopped.output
    assert not (tmp_path / "tuned.json").exists()
    lines = (tmp_path / "tuned.jsonl").read_text().splitlines()
    done = tune("--psnr", "15")
    assert done.exit_code == 0 and (tmp_path / "tuned.json").exists()
    assert (tmp_path / "tuned.jsonl").read_text().splitlines()[: len(lines)] == lines


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "either --psnr or --speedup"),
        (("--psnr", "30", "--speedup", "2"), "either --psnr or --speedup"),
        (("--speedup", "0.5"), "--speedup 0.5 must be above 1"),
        (("--speedup", "nan"), "--speedup nan must be above 1"),
        (("--psnr", "-3"), "--psnr -3 must be above 0"),
        (("--psnr", "nan"), "--psnr nan must be above 0"),
        (("--psnr", "30", "--margin", "-1"), "--margin -1 must be 0 or more"),
        (("--psnr", "30", "--share", "nan"), "--share nan must be above 0 and at most 1"),
        (("--psnr", "30", "--journal", "nowhere/t.jsonl"), "folder nowhere does not exist"),
        (("--psnr", "30", "--minutes", "-1"), "--minutes -1 must be above 0, or 0 for no limit"),
        (("--psnr", "30", "--minutes", "1e-5"), "1e-05 minutes were over before a dense sample was drawn: give more"),
        (("--psnr", "30", "--stages", "0"), "at least 1 each"),
        (("--psnr", "inf"), "--psnr inf must be above 0, and finite"),
        (("--speedup", "inf"), "--speedup inf must be above 1, and finite"),
        (("--psnr", "30", "--margin", "inf"), "--margin inf must be 0 or more"),
        (
            ("--psnr", "30", "--seed", str(2**64 - 2)),
            f"--seed {2**64 - 2} must be from {-(2**63)} to {2**64 - 3} for 3",
        ),
        (("--psnr", "30", "--guidance", "nan"), "guidance nan must be a finite number"),
        (("--psnr", "30", "--label", "1"), "--label and prompts: a model takes one of them"),
        (("--psnr", "30", "--frames", "4"), "--frames is for videos, and emoji makes images"),
        (("--psnr", "30", "--checkpoint", "x.pth"), "--checkpoint is for models of timm, and emoji is none"),
        (("--psnr", "30", "--journal", "tuned.json", "--out", "tuned.json"), "is what --out tuned.json writes"),
        (("--psnr", "30", "--journal", "tuned.html", "--out", "tuned.json"), "is what --out tuned.json writes"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_runs(tune, arguments, why):
    done = tune(*arguments)
    assert done.exit_code and why in str(done.exception)


def test_pipelines_options_are_refused_for_a_model_of_timm(tmp_path):
    given = ["--psnr", "30", "--model", "timm:x", "--pictures", str(tmp_path)]
    words = ["tune", "--out", str(tmp_path / "t.json"), *given]
    for more, why in (("--steps 3", "--steps is"), ("--label 1 --stages 2", "--label and --stages are")):
        done = CliRunner().invoke(app, [*words, *more.split()])
        assert done.exit_code and f"{why} for pipelines, and timm:x is a model of timm" in str(done.exception)


def test_a_second_search_does_not_write_to_the_journal_of_one_that_runs(tune, tmp_path):
    from visattn.files import alone

    journal = tmp_path / "tuned.jsonl"
    with alone(journal):
        done = tune("--psnr", "15")
        assert done.exit_code and f"another run is writing to {journal}" in str(done.exception)
    assert not journal.exists()


def test_prompts_of_any_editor_are_the_same(tmp_path):
    from visattn.cli.tune import _lines

    file = tmp_path / "prompts.txt"
    for data in (b"red disc\nblue b\xc3\xa4r\n", b"\xef\xbb\xbfred disc\r\n \r\nblue b\xc3\xa4r"):
        file.write_bytes(data)
        assert _lines(file, "a prompt") == ("red disc", "blue b\u00e4r")
    file.write_bytes("red disc".encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts.txt is no text in UTF-8 .*: save it as UTF-8"):
        _lines(file, "a prompt")


def test_a_pattern_to_show_needs_its_grid():
    done = CliRunner().invoke(app, ["show", "na(window=3x3)"])
    assert done.exit_code and "pass --grid" in str(done.exception)


@pytest.mark.parametrize(
    ("seconds", "missed", "said", "warned"),
    [
        (1.0, "", "attention is 2.00x faster than dense, a whole sample 1.50x faster", False),
        (4.0, "", "attention is 2.00x slower than dense, a whole sample 2.00x slower", True),
        # Dense attention itself, whose two times differ by noise.
        (4.0, "no candidate is faster", "attention is 2.00x slower", False),
    ],
)
def test_a_schedule_slower_than_dense_is_called_that(seconds, missed, said, warned, tmp_path, capsys):
    figures = {"attention_seconds": seconds, "attention_seconds_dense": 2.0}
    figures |= {"seconds": 2 * seconds if seconds > 1 else 2.0, "seconds_dense": 4.0 if seconds > 1 else 3.0}
    found = types.SimpleNamespace(ranks={}, complete=True, held=True, missed=missed)
    _say(tmp_path / "tuned.json", Goal(30.0), None, found, figures)
    printed = capsys.readouterr().out
    assert said in printed and ("! the schedule takes longer than dense" in printed) == warned


def test_few_prompts_verify_for_themselves_alone(tune):
    done = tune("--psnr", "15", "--seeds", "2")
    assert done.exit_code == 0, done.output
    assert "the 2 prompts that were searched with" in done.output and "more than --seeds 2 prompts" in done.output
