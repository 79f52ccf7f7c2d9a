"""The animated emoji's data, captions and training: what is picked, held out, drawn, learned, resumed and exported."""

import io
import json
import time
import zlib
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.train import animoji_data, emoji_captions
from scripts.train.animoji import Training, fuse_norms, main, sample_prompts
from scripts.train.animoji_captions import MOVING, STILL, caption, captions, motions, split_of
from scripts.train.animoji_data import FILE, SIDE, decode_clip, encode_clip, load_pack
from scripts.train.animoji_pictures import clip_weights, stage_weights, with_pictures
from scripts.train.animoji_sources import FRAMES, frames_of, picked
from scripts.train.animoji_training import Config, draw, to_clips
from scripts.train.checkpoints import weights_of
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN
from scripts.train.emoji_data import load_pack as load_pictures
from scripts.train.emoji_optimizer import build_optimizers
from scripts.train.emoji_sources import Emoji
from scripts.train.flow_loop import run
from tests.support import tiny_emoji
from tests.support.tiny_animoji import EMOJI, frames, tiny_pack

TINY = {"budget": 0, "steps": 4, "sides": (32, 32), "lengths": (1, 2), "shares": (0.5, 1.0), "tokens": 512, "warmup": 2}
SHAPE = {"heads": 1, "layers": 1, "ffn": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pack(tmp_path_factory.mktemp("animoji") / "pack")


@pytest.fixture(scope="module")
def pack(folder):
    return load_pack(folder)


def test_frames_are_picked_at_equal_times_of_the_loop():
    assert picked([42] * 72) == [i * 72 // 16 for i in range(16)]
    assert picked([10, 30], 4) == [0, 1, 1, 1]
    assert picked([100, 50, 50], 4) == [0, 0, 1, 2]
    assert picked([40] * 3, 6) == [0, 0, 1, 1, 2, 2]
    assert picked([0, 0], 4) == [0, 0, 1, 1]


def test_frames_of_an_animation_respect_durations_and_are_on_white():
    colors = ("red", "blue")
    images = [PIL.Image.new("RGBA", (64, 64), color) for color in colors]
    images[0].putpixel((0, 0), (0, 0, 0, 0))
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=[300, 100], lossless=True)
    found = frames_of(PIL.Image.open(file))
    assert [frame.getpixel((128, 128)) for frame in found] == [(255, 0, 0)] * 12 + [(0, 0, 255)] * 4
    assert sum(found[0].getpixel((0, 0))) > 700


def test_clips_survive_packing(pack):
    for i, emoji in enumerate(EMOJI):
        kind = STILL if emoji.name.endswith("bar") else MOVING
        assert pack.pictures[i].style == kind
        drawn = np.stack([np.asarray(frame.reduce(4)) for frame in frames(emoji)])
        error = pack.pixels[i].permute(0, 2, 3, 1).numpy() - drawn.astype(int)
        assert pack.pixels[i].shape == (FRAMES, 3, SIDE, SIDE)
        assert np.abs(error).mean() < 6
    still = frames(EMOJI[0])[:1] * FRAMES
    kind, data = encode_clip(still)
    assert kind == STILL
    assert (decode_clip(data) == decode_clip(data)[0]).all()


def test_whole_emoji_are_held_out_and_the_emoji_model_has_not_seen_them():
    emoji = [Emoji(f"{i:x}", f"{i:x}", "name", (), 0) for i in range(4000)]
    new, pair = ([each for each in emoji if split_of(each) == split] for split in (NEW_EMOJI, NEW_PAIR))
    assert 0.04 < len(new) / len(emoji) < 0.06
    assert 0.04 < len(pair) / len(emoji) < 0.06
    assert all(split_of(each) == emoji_captions.split_of(each, "3d") for each in emoji)


def test_what_is_held_out_does_not_depend_on_when_a_pack_was_made(folder, tmp_path):
    with safe_open(folder / FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = zlib.decompress(tensors["pictures"].numpy().tobytes()).replace(NEW_EMOJI.encode(), TRAIN.encode())
    tensors["pictures"] = torch.frombuffer(bytearray(zlib.compress(old)), dtype=torch.uint8)
    save_file(tensors, tmp_path / FILE)
    assert load_pack(tmp_path).pictures == load_pack(folder).pictures


def test_pictures_teach_looks_beside_the_clips(pack, tmp_path):
    tiny_emoji.write_pack(tiny_emoji.drawn(), tmp_path, new_tokenizer=True)
    stills = load_pictures(tmp_path, side=SIDE)
    with pytest.raises(ValueError, match="tokenizer is not that of the clips"):
        with_pictures(pack, stills)
    both = with_pictures(pack, replace(stills, tokenizer=pack.tokenizer))
    clips = len(pack.pictures)
    assert torch.equal(both.pixels[:clips], pack.pixels)
    assert (both.pixels[clips:] == stills.pixels[:, None]).all()
    assert len(both.pictures) == len(both.pixels) == len(both.tokens) == len(both.plain)
    held = torch.tensor([each.split != TRAIN for each in both.pictures])
    own = torch.tensor([each.style == "3d" for each in both.pictures])
    for length, share in ((1, 0.6), (4, 0.15)):
        weights = stage_weights(both, length)
        assert weights[clips:].sum() == pytest.approx(share)
        assert weights.sum() == pytest.approx(1)
        assert not weights[held].any()
        assert bool(weights[own].any()) == (length == 1)
        assert torch.equal(stage_weights(pack, length), pack.weights(TRAIN))
    assert torch.equal(clip_weights(both, TRAIN)[:clips], pack.weights(TRAIN))
    assert not clip_weights(both, TRAIN)[clips:].any()


def test_captions_name_what_moves_and_are_the_same_in_every_run():
    emoji = Emoji("1f939", "1f939", "man juggling", ("balance", "skill"), 0)
    found = captions(emoji, MOVING, 120)
    assert found == captions(emoji, MOVING, 120)
    assert found.count(caption(emoji)) >= 40
    assert {"man juggling", "man, juggling", "juggling man, 3d", "animated man juggling"} <= set(found)
    assert not any(STILL in each for each in found)
    assert any(STILL in each for each in captions(emoji, STILL, 120))
    assert motions("crossed swords") == motions("ring") == []
    assert motions("flying saucer") == ["flying"]
    assert motions("wrestling ring") == ["wrestling"]


def test_clips_are_successive_frames(pack):
    generator = torch.Generator().manual_seed(0)
    clips = to_clips(pack.pixels[:8], 4, SIDE, generator)
    assert clips.shape == (8, 3, 4, SIDE, SIDE)
    for clip, pixels in zip(clips, pack.pixels, strict=False):
        whole = pixels.transpose(0, 1).float() / 127.5 - 1
        assert any(torch.equal(clip, whole[:, i : i + 4]) for i in range(FRAMES - 3))
    assert to_clips(pack.pixels[:2], FRAMES, 32, generator).shape == (2, 3, FRAMES, 32, 32)


def test_training_never_draws_what_is_held_out_and_batches_depend_on_the_seed(pack):
    weights = pack.weights(TRAIN)
    assert len(pack.of(NEW_EMOJI))
    assert not weights[pack.of(NEW_EMOJI)].any()
    config = Config(**TINY, **SHAPE)
    one, two = (draw(pack, weights, 1, 4, config, 3) for _ in range(2))
    assert torch.equal(one.clean, two.clean)
    assert torch.equal(one.noisy(), two.noisy())
    assert torch.equal(one.ids, two.ids)


def test_everything_is_trained_and_every_matrix_of_the_blocks_gets_muon():
    model = Config(**TINY, **SHAPE).model()
    muon, adam = build_optimizers(model, 1e-3, 0.0)
    trained = [parameter for group in (*muon.param_groups, *adam.param_groups) for parameter in group["params"]]
    assert {id(each) for each in trained} == {id(each) for each in model.parameters()}
    inner = {id(p) for p in muon.param_groups[0]["params"]}
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    assert {id(p) for p in matrices} <= inner
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])


def test_fused_norms_are_the_norms():
    config = Config(**TINY, **SHAPE)
    one, other = (config.model().transformer for _ in range(2))
    fuse_norms(other)
    torch.manual_seed(0)
    for model in (one, other):
        torch.nn.init.ones_(model.proj_out.weight)
    clip, text = torch.randn(1, 3, 2, 16, 16), torch.randn(1, 5, 192)
    made = [model(clip, torch.tensor([500.0]), text, return_dict=False)[0] for model in (one, other)]
    torch.testing.assert_close(*made)
    low = torch.randn(4, 64).bfloat16()
    norm = next(module for module in other.modules() if isinstance(module, torch.nn.RMSNorm))
    assert norm(low).dtype == torch.bfloat16


def test_the_loss_falls_and_a_resumed_run_is_the_run_that_restarted_there(pack, tmp_path):
    config = Config(**TINY | {"steps": 10, "tokens": 16 * 64, "lr": 1e-2}, **SHAPE)
    whole = Training(config, pack)
    encoder = whole.model.text_encoder.shared.weight.detach().clone()
    before = whole.losses()[TRAIN]
    for _ in range(8):
        whole.step()
    whole.average.load_state_dict(whole.model.state_dict())
    assert whole.losses()[TRAIN] < 0.8 * before
    assert not torch.equal(whole.model.text_encoder.shared.weight, encoder)
    whole.save(tmp_path)
    resumed = Training(config, pack, tmp_path)
    whole.restart()
    assert resumed.progress == whole.progress
    for _ in range(2):
        assert torch.equal(whole.step(), resumed.step())


def test_a_run_writes_everything_and_exports_a_pipeline_that_loads(pack, tmp_path):
    training = Training(Config(**TINY | {"steps": 2}, **SHAPE), pack)
    run(training, tmp_path, 1e9, time.monotonic(), lambda line: None, sample_steps=1)
    log = json.loads((tmp_path / "log.json").read_text())["log"]
    assert log[-1]["step"] == 2
    assert set(log[-1]["losses"]) == {each.split for each in pack.pictures}
    assert (tmp_path / "samples.png").is_file()
    main(["--out", str(tmp_path), "--export-only"])
    from visattn.pipelines.embedded.pixel_wan_text import PixelWanTextPipeline

    pipe = PixelWanTextPipeline.from_pretrained(tmp_path / "animoji")
    ours = weights_of(training.average.transformer)["blocks.0.attn1.to_q.weight"].half().float()
    assert torch.equal(dict(pipe.transformer.named_parameters())["blocks.0.attn1.to_q.weight"], ours)
    again = Training(Config(**TINY, **SHAPE), pack, resume=tmp_path / "animoji")
    assert again.progress.step == 0
    assert "clapping hands" in sample_prompts(pack)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sides", "64", "--shares", "1"], "as many"),
        (["--sides", "128", "64", "64"], "does not divide 64"),
        (["--lengths", "1", "4", "17"], "length 17"),
        (["--layers", "0"], "above 0"),
        (["--pictures", "nowhere"], "does not exist"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(SystemExit, match=message):
        main(options)


def test_a_sheet_of_samples_becomes_an_animation(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (16, FRAMES, 3), np.uint8)
    PIL.Image.fromarray(colors.repeat(SIDE, 0).repeat(SIDE, 1)).save(tmp_path / "samples.png")
    main(["--out", str(tmp_path), "--animate-only"])
    with PIL.Image.open(tmp_path / "samples.webp") as made:
        assert (made.n_frames, made.size) == (FRAMES, (16 * SIDE, 4 * SIDE))
        made.seek(5)
        found = np.asarray(made.convert("RGB"))[SIDE :: 2 * SIDE, SIDE :: 2 * SIDE].reshape(16, 3)
    assert np.abs(found.astype(int) - colors[:, 5]).max() < 24
    with pytest.raises(SystemExit, match="does not exist: it is written at the end"):
        main(["--out", str(tmp_path / "none"), "--animate-only"])


def test_captions_are_read_without_decoding_clips(folder, pack, monkeypatch):
    monkeypatch.setattr(animoji_data, "decode_clip", lambda *_: pytest.fail("decoded"))
    found = load_pack(folder, clips=False)
    assert found.pictures == pack.pictures and found.pixels.shape == (len(pack.pictures), 0)
