"""Methods trained and measured by one command: rows before and after, resuming, the budget, pictures, bad input."""

import argparse
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from scripts.distill import pipeline as distill
from scripts.measure import trained
from scripts.measure.emoji_encoder_model import DualEncoder, save_encoder
from scripts.train.emoji_data import write_pack
from tests.support.tiny_animoji import tiny_pack as tiny_clips
from tests.support.tiny_emoji import drawn, narrow_encoder, tiny_pack
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from tests.support.tiny_pixel_wan_text import tiny_pixel_wan_text


@pytest.fixture(scope="module", autouse=True)
def _narrow_encoder():
    with narrow_encoder():
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_pack(folder / "pack")
    tiny_pixel_flux().save_pretrained(folder / "model")
    torch.manual_seed(0)
    save_encoder(DualEncoder(), folder / "encoder.safetensors", {"steps": 0})
    return folder


@pytest.fixture
def here(monkeypatch):
    """Trainings run in this process, which has imported everything."""

    def train(options, folder, seconds):
        distill.main(["--out", str(folder), *options])
        return 1.0

    monkeypatch.setattr(trained, "train_student", train)


def words(places, out, *more):
    known = ["emoji", "--data", places / "pack", "--encoder", places / "encoder.safetensors", "--out", out / "out.json"]
    known += ["--model", places / "model", "--runs", out / "runs", "--size", 32, "--captions", 2, "--steps", 1]
    known += ["--draw-steps", 1, "--cached", 2, "--chunk", 2, "--batch", 2, "--threads", 1, "--seconds", 0]
    return [str(word) for word in [*known, *more]]


def test_a_pack_that_the_judge_would_misread_is_told_before_anything_learns(places, tmp_path, monkeypatch):
    write_pack(drawn(), tmp_path / "pack", new_tokenizer=True)
    monkeypatch.setattr(trained, "draw", lambda *_: pytest.fail("drew"))
    with pytest.raises(SystemExit, match=r"the pack's tokenizer .* is not the encoder's"):
        trained.main(words(places, tmp_path, "--methods", "topk", "--data", tmp_path / "pack"))


def test_methods_are_trained_and_measured_once(places, tmp_path, here, monkeypatch):
    more = ["--train-steps", 2, "--sparsities", 0.5, "--methods", "sla2", "--pictures", tmp_path / "look"]
    trained.main(words(places, tmp_path, *more, "--also", "--log-every", 1))
    figures = json.loads((tmp_path / "out.json").read_text())
    told = figures["trained"]["sla2-50"]
    assert told["steps"] == 2 and told["seconds"] == 1 and told["megabytes"] > 0 and told["device"] == "cpu"
    assert [step for step, _ in told["curve"]] == [1, 2] or len(told["curve"]) == 1
    final = trained.METHODS["sla2"].final(0.5)
    assert list(figures["rows"]) == ["dense, 32 px, shipped", f"{final}, 32 px, shipped", f"{final}, 32 px, sla2-50"]
    after = figures["rows"][f"{final}, 32 px, sla2-50"]
    assert after["psnr"] > 0 and after["seen"]["pictures"] == 2 and after["attention_seconds"] > 0
    assert (tmp_path / "look" / "sla2.png").is_file()

    monkeypatch.setattr(trained, "train_student", lambda *_: pytest.fail("trained again"))
    before = figures["rows"]
    trained.main(words(places, tmp_path, *more))
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == before


def test_each_of_a_chain_starts_from_the_one_before(places, tmp_path, monkeypatch):
    given = []

    def train(options, folder, seconds):
        given.append(options)
        distill.main(["--out", str(folder), *options])
        return 1.0

    monkeypatch.setattr(trained, "train_student", train)
    more = ["--train-steps", 1, "--sparsities", 0.75, 0.5, "--methods", "sla2", "--chain"]
    trained.main(words(places, tmp_path, *more))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert "--weights" not in given[0]
    assert given[1][given[1].index("--weights") + 1] == str(tmp_path / "runs" / "sla2-50" / "student.safetensors")
    assert given[1][given[1].index("--pattern") + 1] == "sla2(keep=0.25)"
    assert figures["trained"]["sla2-75"]["after"] == "sla2-50" and "after" not in figures["trained"]["sla2-50"]
    assert len(figures["rows"]) == 5
    # What it was trained from stays true, whatever is asked for later.
    trained.main(words(places, tmp_path, *more[:-1]))
    assert json.loads((tmp_path / "out.json").read_text())["trained"]["sla2-75"]["after"] == "sla2-50"


def test_clips_are_trained_and_measured_too(tmp_path, here):
    tiny_clips(tmp_path / "pack")
    tiny_pixel_wan_text().save_pretrained(tmp_path / "model")
    save_encoder(DualEncoder(), tmp_path / "encoder.safetensors", {"steps": 0})
    given = words(tmp_path, tmp_path, "--methods", "vsa", "--sparsities", 0.5, "--train-steps", 1, "--size", 16)
    trained.main(["animoji", *given[1:]])
    figures = json.loads((tmp_path / "out.json").read_text())
    before, after = list(figures["rows"].values())[1:]
    assert after["weights"] == "vsa-50" and after["seen"]["flicker"] >= 0 and before["psnr"] > 0


def test_the_budget_ends_it_with_what_there_is(places, tmp_path):
    more = ["--train-steps", 1, "--methods", "vsa", "--sparsities", 0.5, "--budget", 0.01, "--seconds", 1]
    trained.main(words(places, tmp_path, *more))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["trained"] == {"vsa-50": {"error": "not trained: the budget is over"}}


@pytest.mark.parametrize(
    ("more", "error"),
    [(["--methods", "slam"], "'slam' does not exist"), (["--sparsities", "90"], "between 0 and 1")],
)
def test_wrong_settings_before_anything_is_drawn(places, tmp_path, more, error, monkeypatch):
    monkeypatch.setattr(trained, "draw", lambda *_: pytest.fail("samples were drawn"))
    with pytest.raises(SystemExit, match=error):
        trained.main(words(places, tmp_path, *more))


def test_curves_are_drawn(tmp_path):
    from scripts.measure.trained_pictures import draw_curves

    lines = {f"a-{i}": {"curve": [[1, 1.0], [2, 0.5 / (i + 1)]]} for i in range(20)}
    draw_curves(tmp_path / "curves.svg", lines | {"b": {"error": "none"}})
    text = (tmp_path / "curves.svg").read_text()
    assert text.count("<polyline") == 20
    assert text.count('stroke-dasharray="2 2"') == 2 * 4


@pytest.mark.slow
def test_nothing_is_drawn_where_nothing_is_left_to_train(places, tmp_path, here, monkeypatch):
    more = ["--train-steps", 1, "--methods", "vsa", "--sparsities", 0.5]
    trained.main(words(places, tmp_path, *more))
    monkeypatch.setattr(trained, "draw", lambda *_: pytest.fail("samples were drawn"))
    trained.main(words(places, tmp_path, *more))
    # Nor where no training would begin; and why none did takes no student away.
    before = json.loads((tmp_path / "out.json").read_text())
    late = [*more, "--budget", 0.01, "--seconds", 1, "--runs", tmp_path / "elsewhere"]
    trained.main(words(places, tmp_path, *late))
    assert json.loads((tmp_path / "out.json").read_text()) == before


def test_a_student_that_has_no_row_yet_does_not_pass_for_the_one_before_it(places, tmp_path, here):
    trained.main(words(places, tmp_path, "--train-steps", 1, "--methods", "topk", "--sparsities", 0.5))
    figures = json.loads((tmp_path / "out.json").read_text())
    key = f"{trained.METHODS['topk'].final(0.5)}, 32 px, topk-50"
    figures["rows"][key]["weights_hash"] = "another"
    options = argparse.Namespace(runs=tmp_path / "runs", size=32)
    now = {"topk-50": figures["trained"]["topk-50"] | {"steps": 99}, "new": {"error": "late"}}
    found = trained.joined(figures, now, options)
    assert found == figures["trained"] | {"new": {"error": "late"}}
    del figures["rows"][key]
    assert trained.joined(figures, now, options)["topk-50"]["steps"] == 99
