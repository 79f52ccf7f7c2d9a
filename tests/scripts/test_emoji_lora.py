"""A style LoRA of the emoji model: it learns, it loads in diffusers, and apply may come before or after it."""

import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import load_pack
from scripts.train.emoji_lora import FILE, Training, main, parse_arguments, without_style
from scripts.train.emoji_sources import STYLES
from tests.support.tiny_emoji import tiny_pack
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn import apply

STYLE = "3d"  # the tiny pack holds out pictures of it


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny_pack(folder / "pack")
    tiny_pixel_flux().save_pretrained(folder / "model")
    main(words(folder, folder / "out"))
    return folder


def words(places, out, *more):
    given = ["--data", places / "pack", "--model", places / "model", "--out", out, "--style", STYLE, "--rank", 2]
    return [str(word) for word in [*given, "--steps", 3, "--batch", 4, "--side", 32, "--lr", 0.01, *more]]


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("red disc", num_inference_steps=2, generator=generator, output_type="pt").images


def load(pipe, places):
    pipe.transformer.load_lora_adapter(str(places / "out"), prefix=None, weight_name=FILE, use_safetensors=True)


def test_applied_before_and_after_the_pattern_is_the_same(places):
    pattern = "na(window=3x3)"
    before, after, plain = tiny_pixel_flux(), tiny_pixel_flux(), tiny_pixel_flux()
    stock = picture(plain)
    load(before, places)
    alone = picture(before)
    with apply(before, pattern, strict=True) as handle:
        one = picture(before)
        assert handle.report().sites_hit == 2
    with apply(after, pattern, strict=True):
        load(after, places)
        two = picture(after)
    assert torch.equal(one, two)
    assert not torch.equal(one, alone)
    assert not torch.equal(alone, stock)
    assert torch.equal(picture(before), alone)
    assert torch.equal(picture(after), alone)
    with apply(plain, pattern, strict=True):
        assert not torch.equal(picture(plain), one)


def test_the_loss_falls_and_only_the_adapter_learns(places):
    pack = load_pack(places / "pack", side=32)
    pipe = tiny_pixel_flux()
    own = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    options = parse_arguments(words(places, places / "unused", "--steps", "10"))
    found = Training(pipe, pack, options).run(lambda line: None)
    assert found["steps"] == 10
    assert found["after"] < found["before"]
    state = {name.replace(".base_layer", ""): value for name, value in pipe.transformer.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in own.items())


def test_captions_do_not_name_the_style_and_training_sees_nothing_held_out(places):
    pack = load_pack(places / "pack", side=32)
    plain = without_style(pack, STYLE)
    said = plain.tokenizer.decode(plain.plain[0], skip_special_tokens=True)
    assert said == "red disc"
    training = Training(tiny_pixel_flux(), pack, parse_arguments(words(places, places / "unused")))
    for weight, each in zip(training.weights.tolist(), pack.pictures, strict=True):
        assert (weight > 0) == (each.style == STYLE and each.split == TRAIN)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--style", "round"], f"style 'round' does not exist: pass one of {STYLES[0]}"),
        (["--rank", "0"], "argument --rank: '0' must be a whole number of at least 1"),
        (["--model", "nowhere"], "is not an embedded model"),
    ],
)
def test_bad_input_leaves_nothing_behind(places, tmp_path, more, error, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words(places, tmp_path / "out", *more))
    # What the parser refuses is on stderr.
    assert re.search(error, f"{ended.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()
