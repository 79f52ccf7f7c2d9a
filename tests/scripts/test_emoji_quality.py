"""The measurement of the emoji image model: rows, resuming, the dense twin, students, and bad input."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure.draftsman import Draftsman
from scripts.measure.emoji import PATTERNS, main
from scripts.measure.emoji_encoder_model import DualEncoder, save_encoder
from scripts.measure.emoji_judge import BEST, Judge
from scripts.measure.emoji_prompts import SEEN, UNSEEN
from scripts.train.emoji_captions import NEW_PAIR, TRAIN, digest
from scripts.train.emoji_data import load_pack, load_tokenizer, write_pack
from tests.support.tiny_emoji import drawn, narrow_encoder, tiny_pack
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn import apply, parse
from visattn.trained import Trained, save_trained

SPARSE = "na(window=3x3)"


@pytest.fixture(scope="module", autouse=True)
def _narrow_encoder():
    with narrow_encoder():
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    tiny_pack(folder / "pack")
    tiny_pixel_flux().save_pretrained(folder / "model")
    torch.manual_seed(0)
    save_encoder(DualEncoder(), folder / "encoder.safetensors", {"steps": 0})
    return folder


def words(places, out, *more):
    known = ["--data", places / "pack", "--encoder", places / "encoder.safetensors", "--model", places / "model"]
    known += ["--sizes", "32", "--captions", "2", "--steps", "1", "--threads", "1", "--out", out]
    return [str(word) for word in [*known, *more]]


def test_rows_say_what_a_pattern_costs_and_are_not_measured_twice(places, tmp_path, capsys):
    out = tmp_path / "new" / "quality.json"
    main(words(places, out, "--patterns", "dense", SPARSE, "radial(decay=0.5)", "--pictures", tmp_path / "look"))
    figures = json.loads(out.read_text())
    dense, sparse, radial = figures["rows"].values()
    assert list(figures["rows"])[1] == "na(window=3x3), 32 px, shipped"
    assert dense["density"] == 1
    assert "psnr" not in dense
    assert 0 < sparse["density"] < 0.8
    assert sparse["psnr"] < 60
    assert sparse["ssim"] < 1
    # A difference of two estimates, of a step each.
    assert sparse["attention_seconds"] < sparse["seconds"]
    for kind in (SEEN, UNSEEN):
        assert sparse[kind]["pictures"] == 2
        low, high = sparse[kind]["top1_interval"]
        assert low <= sparse[kind]["top1"] <= high
        assert sparse[kind]["top5"] == 1
        assert figures["real"][kind]["frechet"] >= 0
    assert "needs the frames of a video" in radial["error"]
    assert (tmp_path / "look" / "sheet-32.png").is_file()
    assert "radial" in capsys.readouterr().out

    before = out.read_text()
    main(words(places, out, "--patterns", SPARSE))
    assert out.read_text() == before


def test_a_pack_with_another_tokenizer_than_the_judge_is_refused(places, tmp_path):
    write_pack(drawn(), tmp_path / "pack", new_tokenizer=True)
    given = words(places, tmp_path / "quality.json", "--patterns", "dense", "--data", tmp_path / "pack")
    with pytest.raises(SystemExit, match=r"the pack's tokenizer .* is not the encoder's"):
        main(given)
    about = {"steps": 0, "tokenizer": digest(load_tokenizer(tmp_path / "pack"))}
    save_encoder(DualEncoder(), tmp_path / "encoder.safetensors", about)
    main([*given, "--encoder", str(tmp_path / "encoder.safetensors")])


def test_dense_pictures_are_those_of_the_stock_pipeline(places, tmp_path):
    out = tmp_path / "quality.json"
    main(words(places, out, "--patterns", "dense", "na(window=8x8)"))
    whole = json.loads(out.read_text())["rows"]["na(window=8x8), 32 px, shipped"]
    assert whole["psnr"] == BEST
    assert whole["density"] == 1


def test_rows_of_another_model_or_settings_are_not_mixed(places, tmp_path):
    out = tmp_path / "quality.json"
    main(words(places, out, "--patterns", "dense"))
    with pytest.raises(SystemExit, match=r"has rows of guidance 4\.5, not 2\.0"):
        main(words(places, out, "--patterns", "dense", "--guidance", "2"))
    main(words(places, out, "--patterns", "dense", "--guidance", "2", "--force"))
    assert json.loads(out.read_text())["settings"]["guidance"] == 2


def test_a_command_that_is_out_of_time_goes_on_later(places, tmp_path):
    out = tmp_path / "quality.json"
    main(words(places, out, "--patterns", "dense", SPARSE, "--seconds", "1e-9"))
    assert json.loads(out.read_text())["rows"] == {}
    main(words(places, out, "--patterns", "dense"))
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_times_on_a_shared_device_are_left_out_and_added_later(places, tmp_path):
    out, row = tmp_path / "quality.json", "na(window=3x3), 32 px, shipped"
    main(words(places, out, "--patterns", "dense", "--shared"))
    figures = json.loads(out.read_text())
    figures["settings"]["device"] = "another"
    out.write_text(json.dumps(figures))
    # Not even rows without times: tables say one device.
    for more in ([], ["--shared"]):
        with pytest.raises(SystemExit, match="has rows of device 'another', not 'cpu'"):
            main(words(places, out, "--patterns", SPARSE, *more))
    out.write_text(out.read_text().replace('"another"', '"cpu"'))
    main(words(places, out, "--patterns", SPARSE, "--shared"))
    before = json.loads(out.read_text())["rows"][row]
    assert before["seconds"] is None
    assert before["attention_seconds"] is None
    main(words(places, out, "--patterns", SPARSE))
    after = json.loads(out.read_text())["rows"]
    assert after["dense, 32 px, shipped"]["seconds"] is None
    assert 0 < after[row].pop("attention_seconds") < after[row].pop("seconds")
    assert after[row].items() <= before.items()


def test_a_row_of_other_weights_of_the_same_name_is_measured_anew(places, tmp_path):
    out, found = tmp_path / "quality.json", []
    for number in range(3):
        # The third is the second again.
        name = "transformer_blocks.0.attn.to_q.weight"
        weight = dict(tiny_pixel_flux().transformer.named_parameters())[name] * (1 + min(number, 1))
        file = tmp_path / str(number) / "clear" / "student.safetensors"
        file.parent.mkdir(parents=True)
        save_trained(file, Trained({name: weight}, {}, {}, {"pattern": SPARSE, "layers": None, "dense_layers": 0}))
        main(words(places, out, "--patterns", "dense", SPARSE, "--weights", file))
        found.append(json.loads(out.read_text())["rows"])
    key = f"{SPARSE}, 32 px, clear"
    plain = found[0][f"{SPARSE}, 32 px, shipped"]
    assert found[0][key]["psnr"] == plain["psnr"]
    assert found[1][key]["psnr"] != plain["psnr"]
    assert found[2] == found[1]
    assert found[1][f"{SPARSE}, 32 px, shipped"] == plain


def test_every_pattern_of_the_table_runs_on_the_model():
    pipe = tiny_pixel_flux()
    for pattern in PATTERNS:
        assert str(parse(str(parse(pattern)))) == str(parse(pattern))
        with apply(pipe, pattern, strict=True):
            made = pipe("a red apple", num_inference_steps=1, height=256, width=256, output_type="pt").images
        assert made.isfinite().all()


@pytest.fixture(scope="module")
def judge(places):
    return Judge.of(DualEncoder().eval(), load_pack(places / "pack", side=64), 2)


def test_shares_of_a_kind_are_told_by_split_too(judge):
    held = judge.pack.of(TRAIN, NEW_PAIR).tolist()
    whole = replace(judge, chosen={UNSEEN: held, SEEN: judge.chosen[SEEN]})
    new = torch.tensor([judge.pack.pictures[i].split == NEW_PAIR for i in held])
    found = whole.shares(torch.where(new, 0, 3), UNSEEN)["splits"]
    assert {name: (each["pictures"], each["top1"]) for name, each in found.items()} == {
        NEW_PAIR: (int(new.sum()), 1),
        TRAIN: (int((~new).sum()), 0),
    }
    assert "splits" not in whole.shares(torch.zeros(2), SEEN)


def test_likeness_of_equal_pictures_is_the_best(judge):
    pictures = torch.rand(3, 3, 32, 32)
    found = judge.likeness(pictures, pictures)
    assert found["psnr"] == BEST
    assert found["ssim"] == 1
    assert len(judge.captions(SEEN)) == 2


def test_missing_parts_have_a_clear_answer(places, tmp_path):
    with pytest.raises(SystemExit, match="run python -m scripts"):
        main([*words(places, tmp_path / "out.json"), "--encoder", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit, match="measure_emoji: "):
        main([*words(places, tmp_path / "out.json"), "--weights", str(tmp_path / "none.safetensors")])


@pytest.mark.slow
def test_dense_twins_are_drawn_once_for_several_processes(places, tmp_path, monkeypatch):
    drawn, original = [], Draftsman.draw

    def draw(self, student, size, count=None):
        drawn.append(student.pattern)
        return original(self, student, size, count)

    monkeypatch.setattr(Draftsman, "draw", draw)
    rows = []
    # With the twins of the first, and without any.
    for number, more in enumerate((["--twins", tmp_path / "twins"], ["--twins", tmp_path / "twins"], [])):
        out = tmp_path / f"{number}.json"
        main(words(places, out, "--patterns", "dense", SPARSE, "--shared", *more))
        rows.append(json.loads(out.read_text())["rows"])
    assert drawn == ["dense", SPARSE, SPARSE, "dense", SPARSE]
    assert rows[0] == rows[1] == rows[2]
    # Other settings, and times, need their own.
    drawn.clear()
    main(
        words(
            places, tmp_path / "3.json", "--patterns", "dense", "--shared", "--twins", tmp_path / "twins", "--seed", 1
        )
    )
    main(words(places, tmp_path / "4.json", "--patterns", "dense", "--twins", tmp_path / "twins"))
    assert drawn == ["dense", "dense"]
