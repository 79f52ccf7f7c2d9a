"""The measurement of the animoji video model: rows, the dense twin, motion and flicker, patterns, bad input."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure.animoji import PATTERNS, main
from scripts.measure.animoji_judge import ClipJudge, differences, flicker, movement
from scripts.measure.emoji_encoder_model import DualEncoder, save_encoder
from scripts.measure.emoji_judge import BEST
from scripts.measure.emoji_prompts import SEEN, UNSEEN
from scripts.train.animoji_data import load_pack
from tests.support.tiny_animoji import tiny_pack
from tests.support.tiny_emoji import narrow_encoder
from tests.support.tiny_pixel_wan_text import tiny_pixel_wan_text
from visattn import apply, parse

SPARSE = "na(window=3x3x3)"


@pytest.fixture(scope="module", autouse=True)
def _narrow_encoder():
    with narrow_encoder():
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animoji")
    tiny_pack(folder / "pack")
    tiny_pixel_wan_text().save_pretrained(folder / "model")
    torch.manual_seed(0)
    save_encoder(DualEncoder(), folder / "encoder.safetensors", {"steps": 0})
    return folder


def words(places, out, *more):
    known = ["--data", places / "pack", "--encoder", places / "encoder.safetensors", "--model", places / "model"]
    known += ["--sizes", "16", "--captions", "2", "--steps", "1", "--threads", "1", "--out", out]
    return [str(word) for word in [*known, *more]]


def test_rows_say_what_a_pattern_costs_a_clip(places, tmp_path):
    out = tmp_path / "quality.json"
    main(words(places, out, "--patterns", "dense", SPARSE, "na(window=16x4x4)", "--pictures", tmp_path / "look"))
    figures = json.loads(out.read_text())
    dense, sparse, whole = figures["rows"].values()
    assert dense["density"] == 1
    assert 0 < sparse["density"] < 0.8
    assert sparse["psnr"] < 60
    assert whole["psnr"] == BEST
    for kind in (SEEN, UNSEEN):
        assert sparse[kind]["pictures"] == (2 if kind == SEEN else 1)
        for name in ("frechet", "frechet_motion", "movement", "flicker"):
            assert sparse[kind][name] >= 0
            assert figures["real"][kind][name] >= 0
    assert (tmp_path / "look" / "sheet-16.png").is_file()


def test_steady_motion_has_no_flicker():
    steady = torch.linspace(0, 1, 16)[None, :, None, None, None].expand(2, 16, 3, 8, 8)
    assert movement(steady) == pytest.approx(1 / 15)
    assert flicker(steady) == pytest.approx(0, abs=1e-6)
    shaking = (torch.arange(16) % 2).float()[None, :, None, None, None].expand(2, 16, 3, 8, 8)
    assert movement(shaking) == flicker(shaking) == 1
    still = steady[:, :1].expand(-1, 16, -1, -1, -1)
    assert movement(still) == flicker(still) == 0
    assert (differences(still) == 0.5).all()


def test_frechet_distance_of_motion_tells_a_clip_from_its_frames_in_another_order(places):
    torch.manual_seed(0)
    judge = ClipJudge.of(DualEncoder().eval(), load_pack(places / "pack"), 2)
    real = judge.pack.pixels[torch.tensor(judge.chosen[SEEN])].float() / 255
    mixed = real[:, torch.randperm(16)]
    ours, theirs = (judge.named(clips, SEEN) for clips in (real, mixed))
    assert ours["frechet"] == pytest.approx(theirs["frechet"], abs=1e-4)
    assert ours["top1"] == theirs["top1"]
    assert theirs["frechet_motion"] != pytest.approx(ours["frechet_motion"], rel=1e-3)


def test_every_pattern_of_the_table_runs_on_the_model():
    pipe = tiny_pixel_wan_text()
    for pattern in PATTERNS:
        assert str(parse(str(parse(pattern)))) == str(parse(pattern))
        with apply(pipe, pattern, strict=True) as handle:
            made = pipe("clapping hands", num_inference_steps=1, output_type="pt").frames
        assert made.isfinite().all()
        sites = [site for site in handle.report().sites if "attn1" in site.site]
        assert len(sites) == 1
        assert pattern == "dense" or all(site.to_dict()["grid"] == [16, 16, 16] for site in sites)


def test_a_missing_pack_has_a_clear_answer(places, tmp_path):
    with pytest.raises(SystemExit, match=r"measure_animoji: .* run python -m scripts\.train\.animoji_data"):
        main([*words(places, tmp_path / "out.json"), "--data", str(tmp_path)])
