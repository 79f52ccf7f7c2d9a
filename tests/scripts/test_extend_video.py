"""Longer videos by LoRA under a sparse pattern: settings, what learns, runs that go on, and the exported weights."""

import functools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")


from scripts.distill import extend_video
from scripts.train.moving_digits import load_lora, load_pipeline
from scripts.train.moving_digits_training import CLASS_TOKENS
from tests.support.runs import equal, log_of, stopped
from tests.support.tiny_extension import run, save_tiny
from visattn import apply


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("video") / "pipeline")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--frames", "2"], "frames is 2, but .* makes 2 already"),
        (["--pattern", "radiale"], "radiale"),
        (["--rank", "0"], "rank is 0: pass 1 or more"),
        (["--ema", "1"], "from 0 to below 1"),
        (["--model", "nowhere"], "is no pipeline folder"),
        (["--model", "digits"], "pass a pipeline that makes videos"),
        (["--pattern", "na(window=3x3)"], "the grid has 3 axes"),
    ],
)
def test_wrong_settings(folder, tmp_path, more, error):
    with pytest.raises(SystemExit, match=error):
        run(folder, tmp_path / "out", *more)


def test_only_low_rank_updates_of_self_attention_learn(folder, tmp_path):
    found = run(folder, tmp_path / "out", "--sample-every", "4")
    assert len(found) == 2 * 4 and all(".attn1." in name and "lora_" in name for name in found)
    assert all(2 in value.shape for value in found.values())
    assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)
    assert (tmp_path / "out" / "samples" / "000004.png").is_file()
    last = log_of(tmp_path / "out")[-1]
    assert last["event"] == "end" and last["progress"]["step"] == 4


def test_stopped_and_resumed_is_the_same(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole")
    go_on = functools.partial(run, folder, tmp_path / "parts")
    stop = functools.partial(go_on, "--checkpoint-minutes", "0")
    stopped(monkeypatch, extend_video.Extension, "step", lambda run: run.progress.step == 2, stop)
    assert equal(whole, go_on())
    with pytest.raises(SystemExit, match="from another run"):
        run(folder, tmp_path / "parts", "--seed", "1")


def test_loaded_updates_are_the_trained_model(folder, tmp_path):
    config = extend_video.Config(model=str(folder), frames=4, steps=2, batch=1, rank=2, lr=0.05, ema=0.0)
    made = extend_video.Extension(config, tmp_path / "out")
    for _ in range(2):
        made.step()
    made.ema.load_state_dict(made.updates.state_dict())
    made.export()
    plain, tuned = load_pipeline(str(folder)), load_pipeline(str(folder))
    load_lora(tuned, tmp_path / "out" / "lora")
    x, t = torch.randn(1, 1, 4, 8, 8), torch.tensor([500.0])
    words = torch.randn(1, CLASS_TOKENS, plain.transformer.config.text_dim)

    def velocity(model):
        with torch.no_grad(), apply(model, config.pattern):
            return model(x, timestep=t, encoder_hidden_states=words, return_dict=False)[0]

    found = velocity(tuned.transformer)
    torch.testing.assert_close(found, velocity(made.model), atol=1e-5, rtol=1e-4)
    assert (found - velocity(plain.transformer)).abs().max() > 1e-4
