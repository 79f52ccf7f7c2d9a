"""Distillations on several processes give the weights of one: with all weights each, shares of them, or of clips."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
from safetensors.torch import load_file

from tests.support import shared_training, tiny_distill
from tests.support.ranks import Ranks, needs_gloo
from tests.support.runs import log_of, stopping
from tests.support.tiny_digits import tiny_transformer
from tests.support.tiny_moving_digits import tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.dist, needs_gloo]

SCRIPT = "scripts.distill.pipeline"
SMALL = ("--clip", "0.5", "--lr", "0.001", "--ema", "0.5", "--steps", "3", "--threads", "1")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_distill.tiny_pipeline_with_samples(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    tiny_pipeline().save_pretrained(folder / "model")
    tiny_distill.cache(folder, folder / "samples")
    return folder


def compare(whole, folder):
    found = load_file(folder / "student.safetensors")
    assert found.keys() == whole.keys()
    # Softmax does not see the bias of keys: its gradient is rounding, which Adam makes large.
    for name in (name for name in whole if not name.endswith("to_k.bias")):
        torch.testing.assert_close(
            found[name], whole[name], atol=2e-4, rtol=1e-3, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("more", [(), ("--fsdp",), ("--fsdp", "--lora", "2")], ids=["ddp", "fsdp2", "fsdp2, lora"])
def test_processes_and_parts_of_batches_learn_as_one_process(ranks, pictures, tmp_path, more):
    # Relative distances are of each share.
    plain = (*SMALL, *more, "--attention", "0")
    whole = tiny_distill.run(pictures, tmp_path / "one", *plain)
    words = tiny_distill.words(pictures, tmp_path / "two", *plain, "--micro-batch", "1")
    assert ranks.run(2, shared_training.main, SCRIPT, words) == ["", ""]
    compare(whole, tmp_path / "two")
    logs = [log_of(tmp_path / name)[0] for name in ("one", "two")]
    assert logs[0]["denoising"] == pytest.approx(logs[1]["denoising"], rel=1e-4)


def test_each_process_has_a_part_of_the_weights(ranks):
    model = tiny_transformer()
    total = sum(p.numel() for p in model.parameters())
    (student, teacher), (other, _) = ranks.run(2, shared_training.parts)
    assert student + other == total and max(student, other) < 0.6 * total
    first = sum(p.numel() for p in model.transformer_blocks[1].parameters())
    assert teacher < total - 0.4 * first


def test_weights_of_two_processes_go_on_with_one_and_back(ranks, pictures, tmp_path):
    plain = (*SMALL, "--attention", "0", "--fsdp")
    whole = tiny_distill.run(pictures, tmp_path / "one", *plain)
    words = tiny_distill.words(pictures, tmp_path / "two", *plain)
    assert ranks.run(2, shared_training.main, SCRIPT, words, 1) == ["distill: stopped"] * 2
    with stopping(2), pytest.raises(SystemExit, match="stopped"):
        tiny_distill.run(pictures, tmp_path / "two", *plain)
    assert ranks.run(2, shared_training.main, SCRIPT, words) == ["", ""]
    compare(whole, tmp_path / "two")


@pytest.mark.parametrize(
    "more", [("--parallel", "halo"), ("--parallel", "ulysses", "--fsdp", "--checkpointing")], ids=["halo", "ulysses"]
)
def test_processes_that_share_clips_learn_as_one_process(ranks, clips, tmp_path, more):
    plain = (*SMALL, *more, "--pattern", "na(window=3x3x3)")
    whole = tiny_distill.run(clips, tmp_path / "one", *plain)
    words = tiny_distill.words(clips, tmp_path / "two", *plain, "--sequence", "2")
    assert ranks.run(2, shared_training.main, SCRIPT, words) == ["", ""]
    compare(whole, tmp_path / "two")


@pytest.mark.parametrize("more", [(), ("--parallel", "halo")], ids=["videos", "tokens"])
def test_longer_videos_go_on_from_one_process_with_two(ranks, tmp_path, more):
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    from scripts.distill.extend_video import Extension
    from tests.support import tiny_extension

    folder = tiny_extension.save_tiny(tmp_path / "pipeline")
    plain = ("--batch", "2", "--steps", "3", "--checkpoint-minutes", "0", "--pattern", "na(window=3x3x3)")
    whole = tiny_extension.run(folder, tmp_path / "one", *plain)
    with stopping(1, Extension), pytest.raises(SystemExit, match="stopped"):
        tiny_extension.run(folder, tmp_path / "two", *plain)
    assert (tmp_path / "two" / "checkpoint.safetensors").is_file()
    words = tiny_extension.words(folder, tmp_path / "two", *plain, *more)
    assert ranks.run(2, shared_training.main, "scripts.distill.extend_video", words) == ["", ""]
    found = load_file(tmp_path / "two" / "lora" / tiny_extension.LORA_FILE)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)


def test_a_style_is_learned_by_two_processes_as_by_one(ranks, tmp_path):
    pytest.importorskip("peft")
    from scripts.train.emoji_lora import FILE, main
    from tests.support.tiny_emoji import tiny_pack
    from tests.support.tiny_pixel_flux import tiny_pixel_flux

    tiny_pack(tmp_path / "pack")
    tiny_pixel_flux().save_pretrained(tmp_path / "model")
    given = ["--data", tmp_path / "pack", "--model", tmp_path / "model", "--style", "3d", "--rank", 2, "--steps", 3]
    words = [str(word) for word in (*given, "--batch", 4, "--side", 32, "--lr", 0.001, "--out")]
    main([*words, str(tmp_path / "one")])
    shared = ranks.run(2, shared_training.main, "scripts.train.emoji_lora", [*words, str(tmp_path / "two")])
    assert shared == ["", ""]
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-3)


def test_what_cannot_be_shared_is_refused(ranks, pictures, tmp_path):
    for more, why in (
        (("--fsdp", "--sample-every", "1"), "one process draws"),
        (("--sequence", "3"), "must divide the number of processes, 2"),
        (("--sequence", "2"), "no _cp_plan"),
    ):
        words = tiny_distill.words(pictures, tmp_path / "out", *SMALL, *more)
        assert all(why in text for text in ranks.run(2, shared_training.main, SCRIPT, words)), more
