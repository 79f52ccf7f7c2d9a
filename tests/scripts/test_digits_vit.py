"""The small ViT that reads digits: its data, its training, and the table of what patterns cost it."""

import json

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")


def tiny(**options):
    from scripts.train.digits_vit_model import Config

    return Config(**({"coarse_steps": 2, "fine_steps": 2, "batch": 2} | options))


def quiet(line):
    pass


@pytest.fixture
def few(monkeypatch):
    """Only eight held-out digits."""
    from scripts.train import digits_vit_model as digits_vit

    own = digits_vit.split
    monkeypatch.setattr(digits_vit, "split", lambda seen: tuple(t if seen else t[:8] for t in own(seen)))


def test_held_out_digits_are_not_trained_on():
    from scripts.train.digits_data import real_digits
    from scripts.train.digits_vit_model import Batches, build_vit, split

    (seen, labels), (unseen, _) = split(seen=True), split(seen=False)
    assert (len(seen), len(unseen)) == (1200, 597) and set(labels.tolist()) == set(range(10))
    assert torch.equal(torch.cat([seen, unseen]), real_digits()[0])
    images, labels = Batches(tiny()).draw(0, 64)
    assert images.shape == (2, 1, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, Batches(tiny()).draw(0, 64)[0])
    assert not torch.equal(images, Batches(tiny(seed=1)).draw(0, 64)[0])
    model = build_vit()
    assert model.patch_embed.grid_size == (16, 16)
    assert model(images).shape == (2, 10) and model(images[..., ::2, ::2]).shape == (2, 10)


def test_resumed_equals_uninterrupted(few, tmp_path):
    from scripts.train.digits_vit import Training, run

    config = tiny()
    whole = Training(config, tmp_path / "whole")
    assert 0 <= run(whole, quiet) <= 1
    killed = Training(config, tmp_path / "killed")
    for _ in range(3):
        killed.step()
    killed.save()
    killed.step()
    resumed = Training(config, tmp_path / "killed")
    assert resumed.done == 3
    run(resumed, quiet)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "held_out_accuracy" in (tmp_path / "killed" / "log.jsonl").read_text()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_step_lowers_the_loss():
    from scripts.train.digits_vit_model import Batches, build_optimizer, build_vit, train_step

    torch.manual_seed(0)
    model = build_vit().train()
    optimizer, batch = build_optimizer(model), Batches(tiny(batch=8)).draw(0, 32)
    losses = [train_step(model, optimizer, *batch, lr=1e-3) for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    from scripts.train.digits_vit import Training
    from scripts.train.digits_vit_model import load_vit

    with pytest.raises(ValueError, match=r"none.safetensors does not exist: run scripts/train/digits_vit.py first"):
        load_vit(tmp_path / "none.safetensors")
    Training(tiny(), tmp_path).save()
    with pytest.raises(ValueError, match=r"has 0 of 4 steps: run scripts/train/digits_vit.py to its end"):
        load_vit(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"seed 0 then, 1 now\): pass --no-resume or another --out"):
        Training(tiny(seed=1), tmp_path)
    assert Training(tiny(seed=1), tmp_path, resume=False).done == 0


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"lr": 0.0}, {"coarse_steps": -1}, {"fine_steps": -1}, {"augment": -1}]
)
def test_bad_settings_fail_before_work(wrong):
    with pytest.raises(ValueError, match="pass"):
        tiny(**wrong)


def test_the_table_is_measured_row_by_row(few, tmp_path, capsys):
    from scripts.measure.digits_vit import main
    from scripts.train.digits_vit import Training, run

    run(Training(tiny(), tmp_path), quiet)
    out, model = tmp_path / "rows.json", str(tmp_path / "model.safetensors")
    given = ["--model", model, "--steps", "1", "--threads", "1", "--out", str(out), "--patterns"]
    main([*given, "na(window=3x3)"])
    found = json.loads(out.read_text())
    assert found["settings"]["tokens"] == 256 and found["settings"]["parameters"] > 1e6
    found["rows"][0]["as_trained"] = 0.125
    out.write_text(json.dumps(found))
    main([*given, "dense", "na(window=3x3)"])  # the row that is there stays
    rows = json.loads(out.read_text())["rows"]
    assert [(row["pattern"], row["density"] < 1) for row in rows] == [("dense", False), ("na(window=3x3)", True)]
    assert rows[1]["as_trained"] == 0.125 and all(0 <= row["fine_tuned"] <= 1 for row in rows)
    assert "na(window=3x3)" in capsys.readouterr().out
    before = out.read_text()
    with pytest.raises(SystemExit, match=r"has rows of fine_tuning .*: pass another --out"):
        main([*given[:2], "--steps", "2", *given[4:], "na(window=3x3)"])
    assert out.read_text() == before


def test_fine_tuning_leaves_the_trained_model_alone(few):
    from scripts.measure.digits_vit import measure
    from scripts.train.digits_vit_model import build_vit

    model = build_vit()
    before = [p.clone() for p in model.parameters()]
    assert measure(model, "na(window=3x3)", tiny(), 1).keys() == {"pattern", "density", "as_trained", "fine_tuned"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
