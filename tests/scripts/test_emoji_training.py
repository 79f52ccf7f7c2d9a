"""The emoji data's split and captions, and the training program: resuming, determinism, learning, bad input."""

import itertools
import json
import pathlib
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.train import emoji_data
from scripts.train.checkpoints import load_parts, save_parts, weights_of
from scripts.train.emoji import Training, main, sample_prompts
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN, caption, captions, split_of
from scripts.train.emoji_data import load_pack
from scripts.train.emoji_model import export
from scripts.train.emoji_optimizer import Guard, Muon, build_optimizers, orthogonal
from scripts.train.emoji_sources import STYLES, Emoji, archive_name, plain_code, plain_name
from scripts.train.emoji_training import Config, draw
from scripts.train.flow import Progress
from scripts.train.flow_loop import run
from tests.support.tiny_emoji import EMOJI, tiny_pack

TINY = {"budget": 0, "steps": 6, "sides": (32,), "shares": (1.0,), "tokens": 4 * 96, "warmup": 2}
SHAPE = {"heads": 1, "double": 1, "single": 1, "text": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pack(tmp_path_factory.mktemp("emoji") / "pack")


@pytest.fixture(scope="module")
def pack(folder):
    return load_pack(folder, side=32)


def test_codes_and_names_are_plain():
    assert plain_code("0023-FE0F-20E3") == "23-20e3"
    assert plain_name("man: medium-light skin tone") == "man medium-light skin tone"
    assert plain_name("Japanese “bargain” button") == "japanese bargain button"
    assert archive_name("@iconify-json/fluent-emoji@1.2.7") == "iconify-json-fluent-emoji-1.2.7.tgz"


def test_split_holds_out_whole_emoji_and_pairs():
    emoji = [Emoji(f"{i:x}", f"{i:x}", "name", (), 0) for i in range(4000)]
    splits = [[split_of(each, style) for style in STYLES] for each in emoji]
    new = [row for row in splits if NEW_EMOJI in row]
    assert all(set(row) == {NEW_EMOJI} for row in new)
    assert 0.04 < len(new) / len(splits) < 0.06
    rest = [split for row in splits if NEW_EMOJI not in row for split in row]
    assert 0.04 < rest.count(NEW_PAIR) / len(rest) < 0.06
    toned = Emoji("7-1f3fb", "7", "name light skin tone", (), 1)
    assert [split_of(toned, style) for style in STYLES] == splits[7]


def test_captions_are_the_same_in_every_run_and_half_plain():
    emoji = Emoji("1f34e", "1f34e", "apple", ("red", "fruit"), 0)
    found = captions(emoji, "3d")
    assert found == captions(emoji, "3d")
    assert found.count(caption(emoji, "3d")) >= len(found) // 2
    assert len(set(found)) > 2
    assert "an apple" in " ".join(captions(emoji, "flat", 200))


def test_pack_gives_pictures_and_their_captions(pack):
    assert pack.pixels.shape == (len(EMOJI) * len(STYLES), 3, 32, 32)
    assert pack.tokenizer.decode(pack.plain[0], skip_special_tokens=True) == "red disc, 3d"
    assert pack.pixels[0, :, 16, 16].tolist() == [255, 0, 0]
    assert pack.pixels[0, :, 0, 0].tolist() == [255, 255, 255]
    assert pack.null.tolist()[:2] == [1, 0]


def test_training_never_draws_what_is_held_out(pack):
    weights = pack.weights(TRAIN)
    held = pack.of(NEW_PAIR, NEW_EMOJI)
    assert len(held)
    assert not weights[held].any()
    assert weights[pack.of(TRAIN)].all()


def test_batches_depend_on_the_seed_alone(pack):
    config = Config(**TINY, **SHAPE)
    one, two, other = (draw(pack, pack.weights(TRAIN), 32, 8, config, seed) for seed in (3, 3, 4))
    for name in ("clean", "noise", "sigma", "ids"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.noise, other.noise)


def test_a_resumed_run_is_the_run_that_restarted_there(pack, tmp_path):
    config = Config(**TINY, **SHAPE)
    whole = Training(config, pack)
    for _ in range(2):
        whole.step()
    whole.save(tmp_path)
    resumed = Training(config, pack, tmp_path)
    whole.restart()
    assert resumed.progress == whole.progress
    for _ in range(2):
        assert torch.equal(whole.step(), resumed.step())
    for which in ("model", "average"):
        ours, theirs = (weights_of(getattr(each, which)) for each in (whole, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_starts_from_an_exported_pipeline(pack, tmp_path):
    first = Training(Config(**TINY, **SHAPE), pack)
    first.step()
    export(first.model.state_dict(), Config(**SHAPE).model(), pack.tokenizer, tmp_path / "emoji")
    again = Training(Config(**TINY, **SHAPE), pack, resume=tmp_path / "emoji")
    assert again.progress == Progress()
    for name, value in weights_of(first.model).items():
        torch.testing.assert_close(weights_of(again.model)[name], value, atol=1e-3, rtol=1e-3)
        assert torch.equal(weights_of(again.average)[name], weights_of(again.model)[name])
    with pytest.raises(ValueError, match="the weights are of another model"):
        Training(Config(**TINY, **SHAPE | {"single": 2}), pack, resume=tmp_path / "emoji")


def test_the_loss_falls(pack):
    config = Config(**TINY | {"steps": 40, "tokens": 16 * 96}, **SHAPE)
    training = Training(config, pack)
    before = training.losses()[TRAIN]
    while training.progress.done(config) < 1:
        training.step()
    training.average.load_state_dict(training.model.state_dict())
    assert training.losses()[TRAIN] < 0.5 * before


def test_a_run_writes_checkpoint_average_log_and_samples(pack, folder, tmp_path):
    training = Training(Config(**TINY | {"steps": 2}, **SHAPE), pack)
    run(training, tmp_path, 1e9, time.monotonic(), lambda line: None, sample_steps=1)
    log = json.loads((tmp_path / "log.json").read_text())["log"]
    assert log[-1]["step"] == 2
    assert (tmp_path / "samples.png").is_file()
    main(["--data", str(folder), "--out", str(tmp_path), "--export-only"])
    from visattn.pipelines.embedded.pixel_flux import PixelFluxPipeline

    pipe = PixelFluxPipeline.from_pretrained(tmp_path / "emoji")
    saved, _ = load_parts(tmp_path / "average")
    name = "single_transformer_blocks.0.proj_mlp.weight"
    assert torch.equal(dict(pipe.transformer.named_parameters())[name], saved[f"transformer.{name}"])


def test_a_command_stops_when_its_seconds_are_used(pack, tmp_path):
    training = Training(Config(**TINY, **SHAPE), pack)
    run(training, tmp_path, 0.0, time.monotonic(), lambda line: None, sample_steps=1)
    assert training.progress.step == 0
    assert (tmp_path / "state-0.safetensors").is_file()


def test_checkpoints_in_parts_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.train.checkpoints.FILE_BYTES", 50)
    tensors = {name: torch.randn(20).half().float() for name in "abc"}
    assert len(save_parts(tmp_path / "x", tensors, {"n": 1})) == 3
    found, about = load_parts(tmp_path / "x")
    assert about == {"n": 1}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    kept = (tmp_path / "x-1.safetensors").read_bytes()
    save_parts(tmp_path / "x", tensors, {"n": 2})
    (tmp_path / "x-1.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match="another checkpoint"):
        load_parts(tmp_path / "x")
    (tmp_path / "x-1.safetensors").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_parts(tmp_path / "x")
    with pytest.raises(ValueError, match="diverged"):
        save_parts(tmp_path / "x", {"a": torch.tensor([1e6])}, {})


@pytest.mark.parametrize("older", [2, 5])
def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_is_whole(older, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.train.checkpoints.FILE_BYTES", 50)
    old, new = (
        {name: torch.full((20,), value) for name in names} for names, value in (("abcde"[:older], 1.0), ("abc", 2.0))
    )
    real, moves = pathlib.Path.replace, []

    def replace(path, target):
        moves.append(target)
        if len(moves) == kill:
            raise KeyboardInterrupt
        return real(path, target)

    for kill in itertools.count(1):
        stem = tmp_path / f"{kill}" / "x"
        stem.parent.mkdir()
        save_parts(stem, old, {"n": 1})
        moves.clear()
        with monkeypatch.context() as patched:
            patched.setattr(pathlib.Path, "replace", replace)
            try:
                save_parts(stem, new, {"n": 2})
            except KeyboardInterrupt:
                pass
            else:
                break
        found, about = load_parts(stem)
        expected = {1: old, 2: new}[about["n"]]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    # Three files that are written and take their places, and each of these may be the last thing that happens.
    assert kill == 7
    assert sorted(path.name for path in stem.parent.iterdir()) == [f"x-{i}.safetensors" for i in range(3)]


def test_stages_and_learning_rate_follow_the_budget():
    config = Config(budget=100.0)
    assert [config.sides[config.stage(done)] for done in (0, 0.13, 0.2, 0.6, 1.0)] == [64, 64, 128, 256, 256]
    assert config.batch(2) * (64 * 64 + 32) <= config.tokens
    assert config.rate(0.3, 0) < config.rate(0.3, 1000) == config.lr
    assert config.rate(1.0, 1000) == pytest.approx(0.01 * config.lr)
    assert Progress(step=9, seconds=50.0).done(config) == 0.5


def test_muon_steps_are_orthogonal_and_adam_has_the_rest(pack):
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 64)))
    assert values.min() > 0.5
    assert values.max() < 1.3
    model = Config(**TINY, **SHAPE).model()
    muon, adam = build_optimizers(model, 1e-3, 0.0)
    counts = [sum(p.numel() for group in each.param_groups for p in group["params"]) for each in (muon, adam)]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    weight = torch.nn.Parameter(torch.eye(8))
    one = Muon([weight], lr=0.1)
    weight.grad = -torch.eye(8)
    one.step()
    assert (weight.diagonal() > 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "exactly one"),
        (["--sides", "48", "--shares", "1"], "does not divide"),
        (["--shares", "0.5", "0.4", "1"], "must rise"),
        (["--sides", "64"], "as many"),
        (["--lr", "0"], "above 0"),
        (["--ema", "1"], "below 1"),
        (["--data-side", "64"], "pass --data-side 256"),
        (["--data", "nowhere"], "does not exist"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(SystemExit, match=message):
        main(options)


def test_another_model_is_refused(pack, tmp_path):
    config = Config(**TINY, **SHAPE)
    Training(config, pack).save(tmp_path)
    with pytest.raises(ValueError, match="double 1 then, 2 now"):
        Training(Config(**TINY, **SHAPE | {"double": 2}), pack, tmp_path)


def test_sample_prompts_come_from_every_split(pack):
    found = sample_prompts(pack)
    held = {pack.pictures[i].caption for i in pack.of(NEW_PAIR).tolist()}
    assert held & set(found)
    assert "a red apple, 3d" in found


def test_steps_of_a_stage_mix_in_smaller_sides_and_no_larger_one():
    config = Config(sides=(64, 128, 256), shares=(0.1, 0.5, 1.0), mixed=0.25)
    drawn = [config.sides[config.stage_of_step(0.7, step)] for step in range(2000)]
    assert drawn == [config.sides[config.stage_of_step(0.7, step)] for step in range(2000)]
    assert abs(drawn.count(256) / 2000 - 0.75) < 0.04
    assert abs(drawn.count(64) / 2000 - 0.125) < 0.03
    assert {config.sides[config.stage_of_step(0.05, step)] for step in range(200)} == {64}
    assert {config.sides[config.stage_of_step(0.3, step)] for step in range(200)} == {64, 128}
    assert {config.sides[replace(config, mixed=0.0).stage_of_step(0.7, step)] for step in range(200)} == {256}


def test_gradients_that_no_step_could_have_count_as_zero():
    good, wild, lost = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    guard = Guard([good, wild, lost])
    for _ in range(30):
        for parameter in (good, wild, lost):
            parameter.grad = torch.ones(3)
        guard()
    assert guard.dropped.item() == 0
    wild.grad, lost.grad = torch.full((3,), 50.0), torch.tensor([1.0, torch.nan, 1.0])
    good.grad = torch.full((3,), 4.0)
    guard()
    assert guard.dropped.item() == 2
    assert good.grad.tolist() == [4.0] * 3
    assert not wild.grad.any()
    assert not lost.grad.any()
    for parameter in (good, wild, lost):
        parameter.grad = torch.ones(3)
    guard()
    assert guard.dropped.item() == 2


def test_the_first_gradients_of_a_run_may_change_fast():
    parameter = torch.nn.Parameter(torch.zeros(3))
    guard = Guard([parameter])
    for size in (1.0, 100.0, 1.0):
        parameter.grad = torch.full((3,), size)
        guard()
        assert parameter.grad.tolist() == [size] * 3


def test_gradients_that_stay_large_become_usual():
    late, grown = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    guard = Guard([late, grown])
    for step in range(60):
        late.grad = torch.full((3,), 0.0 if step < 30 else 1.0)
        grown.grad = torch.full((3,), 1.0 if step < 30 else 1000.0)
        guard()
    assert late.grad.tolist() == [1.0] * 3
    assert grown.grad.tolist() == [1000.0] * 3
    assert 0 < guard.dropped.item() < 20


def test_captions_are_read_without_decoding_pictures(folder, pack, monkeypatch):
    monkeypatch.setattr(emoji_data, "_decode", lambda *_: pytest.fail("decoded"))
    found = load_pack(folder, side=0)
    assert found.pictures == pack.pictures and found.pixels.shape == (len(pack.pictures), 0)
    assert torch.equal(found.plain, pack.plain) and torch.equal(found.of(TRAIN), pack.of(TRAIN))
