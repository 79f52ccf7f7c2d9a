"""The script that distills the digits model into every student, and the one that times them."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from scripts.bench import students as bench_students
from scripts.distill import digits_students as distill_digits
from visattn import Layout, parse


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--students", "na,nat"], "'nat' does not exist: clear, na, hedgehog"),
        (["--samples", "15"], "--samples 15 must be a multiple of 10"),
        (["--reference", "0"], "--reference 0 must be a multiple of 10"),
        (["--large", "5"], "--large 5 must be a multiple of 10"),
    ],
)
def test_wrong_settings(tmp_path, more, error):
    with pytest.raises(SystemExit, match=error):
        distill_digits.main(["--out", str(tmp_path), *more])


def test_share_of_a_gap():
    assert distill_digits.recovered(10.0, 4.0, 2.0) == 0.75
    assert distill_digits.recovered(0.8, 1.0, 1.0) == pytest.approx(1.0)
    assert distill_digits.recovered(1.0, 1.0, 1.0) is None and distill_digits.recovered(None, 1.0, 2.0) is None


@pytest.mark.slow
def test_a_student_that_fails_does_not_hide_the_others(tmp_path, monkeypatch):
    students = {"na": ("na(window=3x3)", ()), "broken": ("na(window=3x3)", ("--lr", "-1"))}
    monkeypatch.setattr(distill_digits, "STUDENTS", students)
    monkeypatch.setattr(distill_digits.Settings, "__post_init__", lambda self: None)
    sizes = ["--steps", "1", "--batch", "1", "--cached", "10", "--samples", "10", "--reference", "10", "--large", "0"]
    given = ["--out", str(tmp_path), "--students", "broken,na", *sizes, "--cpu", "--threads", "1"]
    with pytest.raises(SystemExit, match="no result for broken"):
        distill_digits.main(given)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found["students"]) == ["na"] and "must be at least 0" in found["failed"]["broken"]
    row = found["students"]["na"]
    assert row["steps"] == 1 and 0 <= row["after"]["recognized"] <= 1 and row["after"]["frechet"] > 0
    assert (tmp_path / "students.png").is_file()


def test_attention_computed():
    layout = Layout((32, 32))
    share = {
        name: bench_students.computed(parse(text), layout, 32) for name, (text, _) in distill_digits.STUDENTS.items()
    }
    dense = 2 * 1024**2 * 32
    assert share["na"] == pytest.approx(49 / 1024, rel=1e-6)
    # 25 tokens of a circle of radius 3, fewer at the border.
    assert 0.9 * 25 / 1024 < share["clear"] < 25 / 1024
    assert share["mala"] == pytest.approx(2 * 1024 * 32 * 32 / dense)
    assert share["hedgehog"] == pytest.approx((2 * 1024 * 64 * 32 + 2 * 1024 * 32 * 32) / dense)
    assert share["agent"] == pytest.approx(4 * 1024 * 64 * 32 / dense)


@pytest.mark.slow
def test_timing_goes_on_with_the_sizes_that_are_missing(tmp_path, capsys):
    out = tmp_path / "students.json"
    given = ["--students", "mala", "--repeats", "1", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    bench_students.main([*given, "--sizes", "16"])
    first = json.loads(out.read_text())["sizes"]["16"]
    bench_students.main([*given, "--sizes", "16", "32"])
    found = json.loads(out.read_text())["sizes"]
    assert found["16"] == first and found["32"]["tokens"] == 256 and set(first) == {"tokens", "stock", "mala"}
    assert 0 < found["32"]["mala"]["attention"] < found["32"]["mala"]["median"]
    assert "computed" in capsys.readouterr().out
