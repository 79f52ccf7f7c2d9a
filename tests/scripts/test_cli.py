"""What all scripts say of wrong options, and that no two of them write to one folder."""

import argparse

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scripts import cli
from visattn.files import opened

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.count, {"1": 1, "12": 12}, ["0", "-3", "1.5", "nan", "", "x"]),
        (cli.number, {"0": 0.0, "-1.5": -1.5, "inf": float("inf")}, ["nan", "", "x"]),
        (cli.seed, {"0": 0, str(cli.MOST_SEED): cli.MOST_SEED}, ["-1", str(cli.MOST_SEED + 1), "9" * 30, "x"]),
        (cli.device, {"cpu": "cpu", "cuda:1": "cuda:1", "auto": "auto"}, ["gpu", "", "cpu:"]),
        (cli.like("seed", 0), {"7": 7}, ["-1"]),
        (cli.like("lr", 0.1), {"7": 7.0}, ["nan"]),
        (cli.like("steps", 3), {"0": 0}, []),
    ],
)
def test_types_of_options(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=text[:10] or "''"):
            kind(text)


def test_files_for_results_have_a_folder_that_can_be_written(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    assert cli.file_to_write(str(path)) == path and path.parent.is_dir()
    path.write_text("old")
    assert cli.file_to_write(str(path)) == path and path.read_text() == "old"
    for wrong, why in (
        (tmp_path / "a", "is a folder: name a file in it"),
        (path / "y.json", "is a file: name a folder"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            cli.file_to_write(str(wrong))


@pytest.mark.parametrize("error", [ValueError("--x 3: pass 4"), OSError(28, "No space left"), MemoryError(), FULL])
def test_what_a_user_can_fix_is_a_line(error):
    with pytest.raises(SystemExit, match=r"^train: .*(pass 4|No space left|choose a smaller size)"), cli.told("train"):
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a fault"), TypeError("x"), SafetensorError("x")])
def test_faults_keep_their_traceback(error):
    with pytest.raises(type(error)), cli.told("train"):
        raise error


def test_a_second_run_is_refused_and_processes_of_one_are_not(tmp_path, monkeypatch):
    with cli.only_run(tmp_path / "out"):
        with pytest.raises(ValueError, match=r"another run is writing to .*out"), cli.only_run(tmp_path / "out"):
            pass
        monkeypatch.setenv("RANK", "1")
        with cli.only_run(tmp_path / "out"):
            pass


def test_what_is_no_whole_file_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x.safetensors does not exist: train"), opened(path, "checkpoint", "train"):
        pass
    save_file({"a": torch.ones(100)}, path, {"run": "1"})
    with opened(path, "checkpoint", "train", "run") as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(ValueError, match="is no checkpoint: train"), opened(path, "checkpoint", "train", "other"):
        pass
    for size in (0, 5, 60, path.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
        with (
            pytest.raises(ValueError, match="is no checkpoint, or not whole"),
            opened(tmp_path / "cut", "checkpoint", ""),
        ):
            pass
