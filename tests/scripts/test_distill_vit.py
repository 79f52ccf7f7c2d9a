"""Distillation of timm models: settings, pictures, losses, runs that stop and go on, and what they leave."""

import functools
import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import timm
from safetensors.torch import load_file, save_file

from scripts.distill import classifier as distill_vit
from scripts.distill import loop, vit, vit_data
from scripts.distill.settings import parse
from scripts.distill.vit_config import VitConfig
from scripts.measure import distilled_vit as measure_distill_vit
from tests.support.runs import equal, killed, log_of, stopped
from visattn import apply
from visattn.trained import export_student, load_own, load_trained, trained_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of timm's smallest ViT and four pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    rng = np.random.default_rng(0)
    for i in range(4):
        (folder / "pictures" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / str(i % 2) / f"{i}.png")
    return folder


def words(folder, out, *more):
    return [
        *("--model", "test_vit", "--checkpoint", str(folder / "vit.safetensors"), "--data", str(folder / "pictures")),
        *("--pattern", "na(window=3)", "--out", str(out), "--steps", "3", "--batch", "2", "--warmup", "1", "--cpu"),
        *("--lr", "0.01", "--log-every", "1", "--save-every", "1", *more),
    ]


def run(folder, out, *more):
    return load_file(distill_vit.main(words(folder, out, *more)))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--pattern", "dense"], "what the teacher has"),
        (["--model", "vit_tiny_patch17"], "is no model of timm: e.g. vit_"),
        (["--data", "nowhere"], "holds no .png"),
        (["--checkpoint", "nowhere"], "does not exist"),
        (["--temperature", "0"], "must be above 0"),
        (["--augment", "3"], "from 0 to 2"),
        (["--train", "qkv"], "attention or all or none"),
        (["--lora", "2", "--train", "all"], "but --train is all"),
        (["--data", "digits"], "digits goes with digits only"),
        (["--logits", "0", "--features", "0", "--attention", "0"], "every loss has weight 0"),
        (["--maps", "1", "--query-heads", "1", "--pattern", "mala"], "linear or agent, not mala"),
        (["--maps", "1", "--query-heads", "1", "--pattern", "linear"], "the student has other heads"),
        (["--lora", "2", "--kv-heads", "1"], "not with --kv-heads"),
        (["--maps", "1"], r"linear or agent, not na\(window=3\)"),
    ],
)
def test_wrong_settings_are_found_before_a_model_is_made(folder, tmp_path, more, error, monkeypatch):
    monkeypatch.setattr(vit, "load_teacher", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(SystemExit, match=error):
        distill_vit.main(words(folder, tmp_path / "out", *more))


def test_weights_of_another_model_are_refused(folder, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="cannot make --model test_vit"):
        run(folder, tmp_path / "out", "--checkpoint", str(tmp_path / "other.safetensors"))


def test_only_attention_learns(folder, tmp_path):
    found = run(folder, tmp_path / "out")
    assert found and all(name.startswith("model.blocks.") and ".attn." in name for name in found)
    lines = log_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"logits", "features", "attention", "gradient", "lr"} <= lines[0].keys()
    assert all(np.isfinite(line["logits"]) for line in lines)


def test_comes_closer_to_the_teacher(folder, tmp_path):
    run(folder, tmp_path / "out", "--steps", "30", "--pattern", "mala", "--lr", "0.002", "--save-every", "30")
    lines = log_of(tmp_path / "out")
    first, last = (sum(line["features"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < 0.7 * first


@pytest.mark.parametrize("more", [(), ("--lora", "2"), ("--pattern", "linear(feature=hedgehog)", "--maps", "1")])
def test_stopped_and_resumed_is_the_same(folder, tmp_path, more, monkeypatch):
    whole = run(folder, tmp_path / "whole", *more)
    go_on = functools.partial(run, folder, tmp_path / "parts", *more)
    stopped(monkeypatch, loop.Run, "train_step", lambda run: run.step == 1, go_on)
    assert equal(whole, go_on())


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(folder, tmp_path):
    more = ("--steps", "12", "--threads", "1")
    torch.set_num_threads(1)
    whole = run(folder, tmp_path / "whole", *more)
    command = [sys.executable, "-m", "scripts.distill.classifier", *words(folder, tmp_path / "killed", *more)]
    killed(command, tmp_path / "killed" / loop.CHECKPOINT)
    assert equal(whole, run(folder, tmp_path / "killed", *more))


@pytest.mark.parametrize(
    "more",
    [
        ("--lora", "2", "--ema", "0"),
        ("--pattern", "linear(feature=hedgehog)", "--ema", "0"),
        ("--query-heads", "0.5", "--ema", "0"),
        ("--kv-heads", "1", "--allocation", "norms", "--ema", "0"),
    ],
)
def test_the_result_is_the_student(folder, tmp_path, more):
    config = parse(VitConfig, None, words(folder, tmp_path / "out", *more))
    with loop.prepared(config):
        made = vit.VitTraining(config)
        made.train_step()
        path = made.export()
    trained = load_trained(path)
    model, x = vit.load_teacher(config), torch.randn(1, 3, 160, 160)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), trained_weights(model, trained), apply(model, config.pattern) as handle:
        load_own(handle, trained)
        torch.testing.assert_close(model(x), made.learner.student(x), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), apply(model, path):
        torch.testing.assert_close(model(x), made.learner.student(x), atol=1e-5, rtol=1e-4)
    # Weights and heads are the teacher's again.
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    if trained.about["heads"] is not None:
        with pytest.raises(ValueError, match="is of a student with other heads"):
            export_student(model, path, tmp_path / "folder")


def test_pictures_depend_on_seed_step_and_part_alone(folder, tmp_path):
    config = parse(VitConfig, None, words(folder, tmp_path, "--batch", "4"))
    pictures = vit_data.open_pictures(config, timm.create_model("test_vit"))
    whole = pictures.draw(7, slice(0, 4))
    assert whole.shape == (4, 3, 160, 160) and whole.isfinite().all()
    assert torch.equal(whole[2:], pictures.draw(7, slice(2, 4)))
    assert not torch.equal(whole, pictures.draw(8, slice(0, 4)))


def test_logit_distance():
    logits, truth = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p = truth.softmax(-1)[0]
    expected = (p * (p / 0.5).log()).sum()
    assert vit.logit_distance(logits, truth, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert vit.logit_distance(truth, truth, 3.0).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("more", [(), ("--heads", "query_heads=0.5, by=norm; kv_heads=0.5")])
def test_figures_of_the_digits_vit(tmp_path, monkeypatch, more):
    from scripts.train import digits_vit_model as digits_vit

    own = digits_vit.split
    for module in (digits_vit, measure_distill_vit):
        monkeypatch.setattr(module, "split", lambda seen: tuple(t if seen else t[:6] for t in own(seen)))
    config, model = digits_vit.Config(coarse_steps=0, fine_steps=1, batch=1), digits_vit.build_vit()
    optimizer = digits_vit.build_optimizer(model)
    digits_vit.save_state(tmp_path / "vit.safetensors", config, 1, model, optimizer)
    given = ["--checkpoint", str(tmp_path / "vit.safetensors"), "--out", str(tmp_path / "out"), "--cpu"]
    measure_distill_vit.main([*given, "--steps", "1", "--batch", "1", "--patterns", "na(window=3x3); mala", *more])
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    each = 2 if more else 1
    assert [row["pattern"] for row in found["rows"]] == ["na(window=3x3)"] * each + ["mala"] * each
    assert found["held_out"] == 6
    shares = {"query_heads": 0.5, "kv_heads": None, "by": "norm"}, {"query_heads": None, "kv_heads": 0.5, "by": "mean"}
    for i, row in enumerate(found["rows"]):
        assert row["heads"] == ({**shares[i % 2], "allocation": "even", "layers": None} if more else None)
        assert all(0 <= row[when][what] <= 1 for when in ("before", "after") for what in ("accuracy", "agreement"))


@pytest.mark.parametrize("heads", ["query=2", "query_heads=two", "by"])
def test_heads_that_are_written_wrong(tmp_path, heads):
    (tmp_path / "vit.safetensors").touch()
    given = ["--checkpoint", str(tmp_path / "vit.safetensors"), "--out", str(tmp_path / "out"), "--heads", heads]
    with pytest.raises(SystemExit, match="must be query_heads=, kv_heads=, by= or allocation= and a value"):
        measure_distill_vit.main(given)


def test_a_window_that_shrinks_reaches_its_end(folder, tmp_path):
    """The student is patched anew as it does: what is trained, recorded and saved stays the same."""
    more = ("--attention", "1", "--ema", "0")
    made = vit.VitTraining(parse(VitConfig, None, words(folder, tmp_path, "--pattern", "na(window=7..3)", *more)))
    windows, names = [], list(made.trained)
    for _ in range(3):
        before = {name: value.detach().clone() for name, value in made.trained.items()}
        assert made.train_step()["attention"] > 0
        windows.append(made.learner.pattern)
        assert any(not value.equal(before[name]) for name, value in made.trained.items())
    assert windows[0] == "na(window=7)" and windows[-1] == "na(window=3)"
    made.config.out.mkdir(exist_ok=True)
    trained = load_trained(made.export())
    assert trained.about["pattern"] == "na(window=3)" and list(made.learner.trained()) == names
