"""The judge of the emoji models: augmentation, captions that are measured, training, its file, and bad input."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure.emoji_augment import augment, may_mirror
from scripts.measure.emoji_encoder import Settings, Training, contrastive, limit, main
from scripts.measure.emoji_encoder_model import ENCODER, SIDE, DualEncoder, load_encoder, save_encoder, to_side
from scripts.measure.emoji_prompts import SEEN, UNSEEN, choose
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import load_pack
from tests.support.tiny_emoji import narrow_encoder, tiny_pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pack(tmp_path_factory.mktemp("emoji") / "pack")


@pytest.fixture(scope="module")
def pack(folder):
    return load_pack(folder, side=64)


@pytest.mark.parametrize(
    ("caption", "mirror"),
    [
        ("red apple, 3d", True),
        ("left arrow, flat", False),
        ("backhand index pointing right, 3d", False),
        ("right-facing fist, 3d", False),
        ("flag sweden, 3d", False),
        ("three o'clock, 3d", False),
        ("bright star, 3d", True),
    ],
)
def test_only_what_reads_alike_is_mirrored(caption, mirror):
    assert may_mirror(caption) is mirror


def test_augmented_pictures_depend_on_the_seed_and_stay_in_range():
    pictures = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mirror = torch.tensor([True, False] * 3)
    one, two, other = (augment(pictures, mirror, 48, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == (6, 3, 48, 48)
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_what_may_not_be_mirrored_is_not():
    picture = torch.ones(1, 3, 64, 64)
    picture[..., :16] = 0
    many = picture.expand(64, -1, -1, -1)
    for mirror, sides in ((True, 2), (False, 1)):
        made = augment(many, torch.full((64,), mirror), 64, torch.Generator().manual_seed(0))
        dark_left = made[..., :32].mean((1, 2, 3)) < made[..., 32:].mean((1, 2, 3))
        assert len(dark_left.unique()) == sides


def test_chosen_captions_are_of_their_splits_and_without_tones(pack):
    found = choose(pack, 10)
    assert len(found[SEEN]) == 10
    assert found == choose(pack, 10)
    assert all(pack.pictures[i].split == TRAIN for i in found[SEEN])
    assert found[UNSEEN]
    assert all(pack.pictures[i].split != TRAIN for i in found[UNSEEN])
    for chosen in found.values():
        assert len({pack.pictures[i].base for i in chosen}) == len(chosen)
    with pytest.raises(ValueError, match="1 captions: at least 2"):
        choose(pack, 1)


def test_equal_captions_are_no_wrong_answers():
    ids = torch.tensor([[5, 1], [5, 1], [6, 1]])
    logits = torch.tensor([[4.0, 9.0, 0.0], [9.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    plain = logits.clone()
    plain[0, 1] = plain[1, 0] = -1e9
    truth = torch.arange(3)
    expected = (torch.nn.functional.cross_entropy(plain, truth) + torch.nn.functional.cross_entropy(plain.T, truth)) / 2
    torch.testing.assert_close(contrastive(logits, ids), expected)


@pytest.mark.parametrize("side", [64, 128, 256, 96])
def test_pictures_of_every_size_are_looked_at(side):
    assert to_side(torch.rand(1, 3, side, side)).shape == (1, 3, SIDE, SIDE)


def test_rank_counts_the_better_captions():
    encoder = DualEncoder().eval()
    pictures = torch.rand(3, 3, SIDE, SIDE)
    ids = torch.tensor([[7, 1] + [0] * 30, [8, 1] + [0] * 30, [9, 1] + [0] * 30])
    cosines = encoder.logits(pictures, ids)
    expected = [(row > row[i]).sum().item() for i, row in enumerate(cosines)]
    assert encoder.ranks(pictures, ids).tolist() == expected


def test_cosines_are_float32_under_autocast():
    encoder = DualEncoder().eval()
    pictures, ids = torch.rand(3, 3, SIDE, SIDE), torch.randint(3, 99, (3, 32))
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.logits(pictures, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, encoder.logits(pictures, ids), atol=0.3, rtol=0)


def test_training_learns_and_repeats(pack):
    settings = Settings(seconds=0, steps=8, batch=4, lr=1e-3)
    first, second = Training(pack, settings), Training(pack, settings)
    losses = []
    for _ in range(8):
        first.done = 0  # the same batch again
        losses.append(first.step(0.3).item())
    assert losses[-1] < losses[0] - 0.2
    assert second.step(0.3).item() == losses[0]


def test_limit_counts_every_augmented_picture(pack):
    found = limit(DualEncoder().eval(), pack, 2)
    assert set(found) == {SEEN, UNSEEN}
    assert all(kind["captions"] == 2 and kind["pictures"] == 8 for kind in found.values())
    assert all(kind["top5"] == 1 for kind in found.values())


def test_an_encoder_is_a_small_file(tmp_path):
    assert save_encoder(DualEncoder(), tmp_path / "encoder.safetensors", {}) < 6_000_000


def test_command_writes_a_file_that_loads(folder, tmp_path, capsys):
    path = tmp_path / "encoder.safetensors"
    words = ["--seconds", "0", "--steps", "1", "--batch", "2", "--captions", "2"]
    with narrow_encoder():
        main(["--data", str(folder), "--out", str(path), *words])
        assert list(tmp_path.iterdir()) == [path]
        encoder, about = load_encoder(path)
    assert about["steps"] == 1
    assert not encoder.training
    shown = capsys.readouterr().out
    assert json.loads(shown)["limit"] == about["limit"]


def test_bad_input_has_a_clear_answer(folder, tmp_path):
    with pytest.raises(ValueError, match="exactly one must be above 0"):
        Settings(seconds=0)
    with pytest.raises(ValueError, match="does not exist: run python"):
        load_encoder(tmp_path / "none.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no emoji encoder"):
        load_encoder(tmp_path / "other.safetensors")
    broken = DualEncoder()
    torch.nn.init.constant_(broken.heat, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        save_encoder(broken, tmp_path / "nan.safetensors", {})
    with pytest.raises(SystemExit, match="does not exist"):
        main(["--data", str(tmp_path), "--seconds", "0", "--steps", "1"])


def test_the_projects_judge_knows_real_emoji_and_says_how_well():
    assert ENCODER.stat().st_size < 6_000_000
    encoder, about = load_encoder(ENCODER)
    assert min(about["limit"][kind]["top1"] for kind in (SEEN, UNSEEN)) > 0.95
    assert about["real_pictures"] > 8000
    assert encoder.heat.isfinite()
