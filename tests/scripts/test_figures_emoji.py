"""Tables of the emoji model, made from results."""

import json

import pytest

from scripts import figures_emoji, results
from scripts.figures_emoji import emoji_tables, quality_table, students_table


def kind(top1, frechet):
    return {"top1": top1, "top1_interval": [top1 - 0.1, top1 + 0.1], "frechet": frechet}


def row(pattern, weights, top1, frechet, **more):
    kinds = {"seen": kind(top1, frechet), "unseen": kind(top1 - 0.1, frechet)}
    times = {"density": 0.077, "seconds": 0.5, "attention_seconds": 0.0625}
    return {"pattern": pattern, "weights": weights} | kinds | times | more


@pytest.fixture
def measured(tmp_path, monkeypatch):
    likeness = {"psnr": 12.25, "ssim": 0.5, "lpips": None}
    rows = [
        row("dense", "shipped", 0.8, 0.02),
        row("mala", "shipped", 0.2, 0.52, **likeness),
        {"pattern": "radial(decay=0.5)", "weights": "shipped", "error": "needs the frames of a video"},
        row("mala", "mala", 0.65, 0.12, **likeness | {"psnr": 20.0}),
    ]
    found = {"real": {"seen": kind(0.9, 0.01), "unseen": kind(0.89, 0.01)}, "rows": dict(enumerate(rows))}
    for module in (figures_emoji, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def save(rows=found["rows"]):
        (tmp_path / "emoji-quality.json").write_text(json.dumps(found | {"rows": rows}))

    save()
    return save


def test_patterns_with_their_own_weights(measured):
    lines = quality_table().splitlines()
    assert lines[2].startswith("| real pictures |")
    assert "90% (80% to 100%)" in lines[2]
    assert (
        "| `mala` | 7.7% | 62 ms | 500 ms | 20% (10% to 30%) | 10% (0% to 20%) | 0.520, 0.520 | 12.2 dB, 0.500 |"
        in lines
    )
    assert lines[-1] == "`radial(decay=0.5)` did not run: needs the frames of a video."
    assert sum("mala" in line for line in lines) == 1


def test_unseen_captions_are_told_apart_where_they_were_measured(measured):
    assert "Unseen" not in quality_table()
    split = {"pictures": 52, "top1": 0.6, "top1_interval": [0.5, 0.7]}
    dense = row("dense", "shipped", 0.8, 0.02)
    dense["unseen"]["splits"] = {"new emoji": split | {"pictures": 48, "top1": 0.3}, "new pair": split}
    measured({"0": dense})
    assert quality_table().endswith(
        "Unseen captions, dense: 60% (50% to 70%) of 52 emoji that training saw in other styles only and "
        "30% (50% to 70%) of 48 emoji that it never saw."
    )


def test_students_before_and_after(measured):
    lines = students_table().splitlines()
    assert lines[2] == "| dense (teacher) | 80% | 70% | 0.020 |  |"
    assert lines[3].startswith(
        "| `mala` | 20% to 65% (75% of the gap) | 10% to 55% (75% of the gap) | 0.520 to 0.120 (80%"
    )
    assert lines[3].endswith("12.2 to 20.0 dB |")


def test_only_what_is_measured_has_a_table(measured):
    assert list(emoji_tables()) == ["emoji-quality", "emoji-students"]
    measured({0: row("dense", "shipped", 0.8, 0.02), 1: row("mala", "mala", 0.5, 0.02, psnr=20.0)})
    assert list(emoji_tables()) == ["emoji-quality"]


def test_pictures_and_their_twins(measured, tmp_path):
    times = {"seconds": 4.0, "attention_seconds": 2.0}
    report = {
        "pattern": "mala", "density": 0.5, "busy": "", "device_name": "a CPU", "threads": 2, "dtype": "float32",
        "attention": {"sites": [{"grid": [64, 64]}]}, "mean": {"psnr": 20.0, "ssim": 0.8},
        "settings": {"dense_steps": 2, "steps": 6, "seed": 0},
        "times": {"dense": times, "sparse": times | {"attention_seconds": 0.5}},
    }  # fmt: skip
    (tmp_path / "generate-emoji.json").write_text(json.dumps(report))
    lines = figures_emoji.pictures_table().splitlines()
    assert lines[2] == "| 4,096 | dense | 100 % | 4.00 s | 2.00 s |  |"
    sparse = "| 4,096 | `mala`, the first 2 of 6 steps dense | 50.0% | 4.00 s | 0.50 s: 4.0x faster | 20.0 dB, 0.800 |"
    assert lines[3] == sparse
    assert lines[-1] == "On a CPU, 2 threads, float32, seed 0."
    assert "emoji" in emoji_tables()


def test_patterns_on_clips(measured, tmp_path):
    motion = {"frechet_motion": 0.25, "movement": 2 / 255, "flicker": 1 / 255}

    def clips(found):
        return found | {name: found[name] | motion for name in ("seen", "unseen")}

    rows = {0: clips(row("dense", "shipped", 0.8, 0.02)), 1: {"pattern": "x", "weights": "shipped", "error": "no"}}
    real = clips({"seen": kind(0.9, 0.01), "unseen": kind(0.89, 0.01)})
    (tmp_path / "animoji-quality.json").write_text(json.dumps({"real": real, "rows": rows}))
    lines = emoji_tables()["animoji-quality"]().splitlines()
    tops = "80% (70% to 90%) | 70% (60% to 80%)"
    assert lines[3] == (
        f"| `dense` | 7.7% | 62 ms | 500 ms | {tops} | 0.020, 0.020 | 0.250, 0.250 | 2.0, 2.0 | 1.0, 1.0 |  |"
    )
    assert lines[2].count("0.250, 0.250") == 1
    assert lines[-1] == "`x` did not run: no."
