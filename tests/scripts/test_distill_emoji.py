"""Distillation of a model that predicts the clean picture from patches: samples, a run, and the students' script."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from scripts.distill import cache_samples, emoji_students
from scripts.distill import pipeline as distill
from scripts.distill.config import Config
from scripts.distill.pipeline import split
from scripts.distill.process import train_student
from scripts.distill.samples import SampleSet
from scripts.distill.settings import parse
from scripts.distill.training import Training
from scripts.measure.emoji_prompts import SEEN, choose
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import load_pack
from tests.support.tiny_emoji import tiny_pack
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn.pipelines.embedded.pixel_flux import to_picture

# A process that SIGINT ends, whether or not a shell in whose background it began told it to ignore it.
SLEEPS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(30)"
PROMPTS = ("red disc, 3d", "blue bar, flat", "green square, 3d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("emoji")
    tiny_pixel_flux().save_pretrained(found / "model")
    tiny_pack(found / "pack")
    (found / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--model", str(found / "model"), "--prompts", str(found / "prompts.txt"), "--count", "4", "--steps", "2"]
    cache_samples.main([*words, "--batch", "2", "--shard", "2", "--device", "cpu", "--out", str(found / "samples")])
    return found


def words(folder, out, *more):
    given = ["--model", folder / "model", "--samples", folder / "samples", "--out", out, "--pattern", "na(window=3x3)"]
    given += ["--steps", 3, "--batch", 2, "--warmup", 1, "--lr", 0.003, "--cpu", "--log-every", 1, *more]
    return [str(word) for word in given]


def test_samples_are_the_tokens_of_what_the_pipeline_draws(folder):
    found = SampleSet(folder / "samples")
    assert found.index.kind == "sample"
    assert found.index.time_scale == pytest.approx(1e-3)
    tokens, told = found.take([1], torch.zeros(1))
    pipe = tiny_pixel_flux()
    generator = torch.Generator().manual_seed(1)
    picture = pipe(PROMPTS[1], num_inference_steps=2, generator=generator, output_type="pt").images
    drawn = to_picture(tokens, (SIDE // 4, SIDE // 4), 4)
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), picture, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told["pooled_projections"], pipe.encode_prompt([PROMPTS[1]]).pooled[:1])


def test_the_target_is_what_the_noise_was_added_to(folder, tmp_path):
    training = Training(parse(Config, None, words(folder, tmp_path)))
    batch = training.draw(training.parts[0])
    # What the denoiser is told is the time by a factor, which rounds.
    torch.testing.assert_close(batch.weights, batch.times.clamp(min=0.05) ** -2, rtol=1e-6, atol=0)
    # What is noisy is the clean picture and noise of about unit variance.
    noise = (batch.noisy - (1 - batch.times.view(-1, 1, 1)) * batch.target) / batch.times.view(-1, 1, 1)
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_a_student_learns_and_draws(folder, tmp_path):
    more = ("--steps", "30", "--denoising", "0", "--output", "1", "--attention", "0", "--sample-every", "30")
    distill.main(words(folder, tmp_path / "out", *more))
    lines = [json.loads(line)["output"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(lines[-8:]) < 0.8 * sum(lines[:8])
    assert (tmp_path / "out" / "samples" / "000030.png").is_file()


def test_prompts_are_not_those_that_are_measured(folder):
    pack = load_pack(folder / "pack", side=32)
    found = emoji_students.prompts(pack, 10_000)
    measured = {pack.pictures[i].caption for i in choose(pack, len(pack.of(TRAIN)) // 2)[SEEN]}
    known = {pack.pictures[i].caption for i in pack.of(TRAIN).tolist()}
    assert found
    assert not measured & set(found)
    assert set(found) <= known
    assert emoji_students.prompts(pack, 3) == found[:3]


def given(folder, out, students):
    found = ["--model", folder / "model", "--data", folder / "pack", "--out", out, "--students", students, "--cpu"]
    found += ["--steps", 4, "--batch", 1, "--cached", 2, "--chunk", 2, "--draw-steps", 1, "--size", SIDE]
    return [str(word) for word in [*found, "--threads", 1]]


def test_every_student_is_trained_and_listed(folder, tmp_path):
    emoji_students.main(given(folder, tmp_path, "clear"))
    found = json.loads((tmp_path / "students.json").read_text())["students"]["clear"]
    assert found["steps"] == 4
    assert found["pattern"] == "clear(radius=8)"
    assert (tmp_path / "clear" / "student.safetensors").is_file()


@pytest.fixture
def runs(monkeypatch):
    """The runs that are asked for, which are not made."""
    found = []

    def train(options, place, seconds):
        # Whatever is asked for are runs that can be.
        for words in split(["--out", str(place), *options]):
            told = parse(Config, None, words)
            found.append(told)
            told.out.mkdir(parents=True, exist_ok=True)
            (told.out / "log.jsonl").write_text(json.dumps({"step": told.steps}))
        return 1.0

    monkeypatch.setattr(emoji_students, "train_student", train)
    return found


def test_linear_students_learn_from_small_samples_first(folder, tmp_path, runs):
    emoji_students.main(given(folder, tmp_path, "mala"))
    sizes = [SampleSet(each.samples).index.settings["size"] for each in runs]
    assert [(int(size), each.batch, each.steps) for size, each in zip(sizes, runs, strict=True)] == [
        (SIDE // 4, 16, 2),
        (SIDE // 2, 4, 2),
        (SIDE, 1, 2),
    ]
    assert [each.out for each in runs] == [*(tmp_path / "mala" / f"phase-{i}" for i in (1, 2)), tmp_path / "mala"]
    assert all(each.train == "all" and each.pattern == "mala" for each in runs)
    found = json.loads((tmp_path / "students.json").read_text())["students"]["mala"]
    assert found["steps"] == 6
    assert [each["size"] for each in found["phases"]] == [SIDE // 4, SIDE // 2, SIDE]


def test_students_go_on_from_an_earlier_run(folder, tmp_path, runs, monkeypatch):
    monkeypatch.setattr(Config, "_check_start", lambda self, trained: None)
    begin = tmp_path / "before" / "mala" / "student.safetensors"
    begin.parent.mkdir(parents=True)
    save_file({"model.x": torch.zeros(1)}, begin, {"visattn": json.dumps({"pattern": "mala"})})
    emoji_students.main([*given(folder, tmp_path / "after", "mala"), "--before", str(tmp_path / "before")])
    sizes = [int(SampleSet(each.samples).index.settings["size"]) for each in runs]
    assert sizes == [SIDE // 2, SIDE], "not the smallest samples again"
    assert [each.steps for each in runs] == [2, 3], "its share of the steps goes to the others"
    assert runs[0].weights == begin
    assert all(each.train == "all" and each.own_lr == pytest.approx(2e-2) for each in runs)


def test_where_students_go_on_from_has_them(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"--before .*before has no .*mala.student\.safetensors: train it there first"):
        emoji_students.main([*given(folder, tmp_path, "mala"), "--before", str(tmp_path / "before")])


def test_an_older_student_is_not_what_a_training_gave(tmp_path, monkeypatch):
    (tmp_path / "student.safetensors").touch()
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=r"has no new student\.safetensors"):
        train_student([], tmp_path, 0)


@pytest.mark.parametrize(
    ("then", "seconds", "why"),
    [("exit 1", 0, ": why"), (f"exec {sys.executable} -c '{SLEEPS}'", 2, ", as it was stopped after 2 s: why")],
)
def test_why_there_is_no_student_stands_on_the_first_line(tmp_path, monkeypatch, then, seconds, why):
    (tmp_path / "python").write_text(f"#!/bin/sh\necho a warning\necho why\n{then}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError) as raised:
        train_student([], tmp_path / "topk-90", seconds)
    first, *rest = str(raised.value).splitlines()
    assert re.fullmatch(rf"topk-90 has no new student\.safetensors{why}", first) and rest == ["a warning", "why"]


def test_a_size_that_small_samples_cannot_have_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="--size 40 must be a multiple of 16"):
        emoji_students.main(["--out", str(tmp_path), "--size", "40"])


def test_unknown_students_are_named(tmp_path):
    with pytest.raises(SystemExit, match="'nat' does not exist: clear, na"):
        emoji_students.main(["--out", str(tmp_path), "--students", "nat"])
