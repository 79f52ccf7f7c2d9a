"""Tuning a timm model: what candidates do to its output, accuracy on pictures with labels, and the command."""

import math

import pytest

pytest.importorskip("timm")

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import visattn
from visattn.cli import app
from visattn.models.tuning import subject as tuning_subject
from visattn.models.tuning.pictures import Pictures
from visattn.models.tuning.subject import BackboneSubject
from visattn.tuned import Tuned
from visattn.tuning import layers
from visattn.tuning.found import tuned
from visattn.tuning.goal import Goal
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer
from visattn.tuning.plan import HELD_OUT, Plan
from visattn.tuning.search import Search
from visattn.tuning.subject import DENSE

CHEAP, GOOD = "na(window=3x3)", "topk(keep=0.8, block=2x2, rest=mean)"
NAMES = (DENSE, CHEAP, GOOD)


def make():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        depth=2,
        embed_dim=48,
        num_heads=2,
        num_classes=4,
        class_token=False,
        global_pool="avg",
    )
    # Weights at which attention matters.
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)
    return model.eval()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The tiny model runs dense attention faster than anything else."""
    monkeypatch.setattr(tuning_subject, "HOPELESS", math.inf)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(1)
    x = torch.randn(24, 3, 64, 64)
    model = make()
    with torch.no_grad():
        labels = model(x).argmax(-1)
    # A few pictures that dense attention does not know.
    labels[::6] = (labels[::6] + 1) % 4
    return BackboneSubject(model, Pictures(x.__getitem__, 24, tuple(labels.tolist()), "noise"))


def test_errors_are_those_of_the_output(subject):
    found = subject.local(0, NAMES, (0, 1, 2), NAMES)
    assert len(found) == 2 and subject.grid == (8, 8)
    for layer in found:
        assert layer[DENSE].error == 0 < layer[GOOD].error < layer[CHEAP].error
        assert all(value.seconds > 0 for value in layer.values())


def test_what_is_slower_than_dense_attention_is_tried_in_one_layer(subject, monkeypatch):
    monkeypatch.setattr(tuning_subject, "HOPELESS", 0.0)
    real, runs = BackboneSubject._run, []

    def run(self, names, seeds):
        runs.append(names)
        return real(self, names, seeds)

    monkeypatch.setattr(BackboneSubject, "_run", run)
    subject.twins((0, 1))
    runs.clear()
    assert [set(layer) for layer in subject.local(0, NAMES, (0, 1), NAMES)] == [{DENSE}] * 2
    assert [names for names in runs if 1 in names] == [{1: DENSE}] * (tuning_subject.TURNS - 1)


def test_accuracy_is_lost_where_only_dense_attention_knows(subject):
    dense, cheap = (subject.outcome((0.0, 1.0), ((name,),) * 2, range(12)) for name in (DENSE, CHEAP))
    assert dense.lost == (0,) * 12 and dense.psnr == (math.inf,) * 12 and 0.5 < dense.twin_accuracy < 1
    with visattn.apply(subject._net, CHEAP), torch.no_grad():
        which = subject.pictures.of_seeds(range(12))
        out = subject._net(torch.stack([subject.pictures.get(i) for i in which])).argmax(-1).tolist()
    right = sum(a == subject.pictures.labels[i] for a, i in zip(out, which, strict=True)) / 12
    assert cheap.lost_points == pytest.approx(100 * (dense.twin_accuracy - right)) and cheap.error > 0


def test_held_out_pictures_are_others(subject):
    measured = subject.pictures.of_seeds(range(12))
    rounds = [subject.pictures.of_seeds(range(HELD_OUT * turn, HELD_OUT * turn + 6)) for turn in (1, 2)]
    assert not set(measured) & {i for each in rounds for i in each} and rounds[0] != rounds[1]
    with pytest.raises(ValueError, match="24 pictures are too few: 13 samples"):
        subject.pictures.of_seeds(range(13))


@pytest.fixture
def quick(monkeypatch):
    """One measurement of each time is enough, and what is slower than dense attention is tried all the same."""
    monkeypatch.setattr(tuning_subject, "TURNS", 1)
    monkeypatch.setattr(layers, "promising", lambda layers, names: names)


def test_a_search_ends_with_a_file_that_applies(subject, quick, tmp_path):
    goal = Goal(accuracy=30.0, held_out=12)
    made = Search(Measurer(subject, Plan(NAMES, 1, seeds=12, quick=4, checks=1), Journal(None, {})), goal)
    found = made.run()
    file = tuned(made.measurer, goal, found)
    file.write(tmp_path / "tuned.json")
    assert file.verified["held"] and file.verified["accuracy_dense"] <= 1 and "snr_mean" in file.verified
    with visattn.apply(subject._net, str(tmp_path / "tuned.json")) as handle, torch.no_grad():
        subject._net(torch.zeros(1, 3, 64, 64))
        assert len(handle.report().sites) == 2
    # Steps are none, and a window is scaled to a larger grid.
    other = make()
    layers = {str(i): {"0-": CHEAP} for i in range(2)}
    Tuned(subject.model, 2, (4, 4), layers).write(tmp_path / "half.json")
    with visattn.apply(other, str(tmp_path / "half.json")) as handle:
        assert str(handle.report().sites[0].pattern) == "na(window=7x7)"


def test_the_command_takes_a_folder_of_classes(quick, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (60 * i, 30, 200 * (name == "b"))).save(
                tmp_path / "pictures" / name / f"{i}.png"
            )
    model = timm.create_model("test_vit", num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "candidates.txt").write_text("na(window=3x3)\n")
    words = ["tune", "--model", "timm:test_vit", "--pictures", tmp_path / "pictures", "--out", tmp_path / "t.json"]
    more = ["--candidates", tmp_path / "candidates.txt", "--checkpoint", tmp_path / "weights.safetensors"]
    counts = ["--seeds", "3", "--held-out", "3", "--accuracy", "50", "--size", "64"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, *more, *counts)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "points lost" in done.output and Tuned.read(tmp_path / "t.json").verified["samples"] == 3
    wrong = CliRunner().invoke(app, ["tune", "--model", "emoji", "--accuracy", "1", "--out", str(tmp_path / "x.json")])
    assert wrong.exit_code and "are for a timm model" in str(wrong.exception)


@pytest.mark.parametrize(
    ("name", "why"), [("none", "does not exist"), ("file", "is no folder"), ("empty", "has 0 images")]
)
def test_what_is_no_folder_of_images_is_said(tmp_path, name, why):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name} {why}"):
        Pictures.of_folder(tmp_path / name, torch.nn.Identity())
