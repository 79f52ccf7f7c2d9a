"""Files are whole or absent, and checked before anything is computed."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from visattn.files import (
    UNFINISHED,
    add_values,
    check_writable_file,
    output_folder,
    prepare_folder,
    read_tensors,
    read_values,
    write_json,
    written_whole,
)


def test_a_block_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n'
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert read_values(path) == {"a": [1]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_tensors_are_read_or_the_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"weights .*a\.safetensors do not exist: pass another"):
        read_tensors(path, "weights", "pass another")
    path.write_text("no tensors")
    with pytest.raises(ValueError, match=r"weights .*a\.safetensors are no safetensors file"):
        read_tensors(path, "weights", "pass another")
    save_file({"x": torch.arange(3)}, path, {"about": "all"})
    tensors, metadata = read_tensors(path, "weights", "pass another")
    assert metadata == {"about": "all"} and torch.equal(tensors.pop("x"), torch.arange(3)) and not tensors
    save_file({}, path)
    assert read_tensors(path, "weights", "pass another") == ({}, {})


def test_folders_are_made_and_never_mixed_with_other_output(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare_folder(folder) == folder
    assert folder.is_dir()
    prepare_folder(folder)
    (folder / "x").write_text("x")
    with pytest.raises(ValueError, match="is not empty: pass --force to overwrite"):
        prepare_folder(folder)
    prepare_folder(folder, force=True)
    assert (folder / "x").read_text() == "x"
    with pytest.raises(ValueError, match="is a file: name a folder"):
        prepare_folder(folder / "x", force=True)
    with pytest.raises(ValueError, match=r"cannot make folder .* name one that you can write"):
        prepare_folder(folder / "x" / "y")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written_is_refused():
    from pathlib import Path

    with pytest.raises(ValueError, match=r"cannot write to /proc/self .* name a folder that you can write"):
        prepare_folder(Path("/proc/self"), force=True)
    with pytest.raises(ValueError, match="cannot write to /proc/self"):
        check_writable_file(Path("/proc/self/x.png"), (".png",))


KILLED = """
import os, sys, time
from pathlib import Path
from visattn.files import output_folder
with output_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


class TestInterruptedRuns:
    def test_a_killed_run_blocks_while_it_lives_and_never_after(self, tmp_path):
        folder = tmp_path / "out"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(ValueError, match="another run is writing to"):
                prepare_folder(folder, force=True)
            assert [p.name for p in folder.glob(f"{UNFINISHED}*/*")] == ["half"]
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        with output_folder(folder) as temporary:
            assert list(folder.iterdir()) == [temporary]
            (temporary / "whole").write_text("whole")
        assert [p.name for p in folder.iterdir()] == ["whole"]

    @pytest.mark.parametrize("names", [(), ("x",)])
    def test_leftovers_are_removed_and_nothing_else_is(self, tmp_path, names):
        for name in ("a", "b"):
            (tmp_path / f"{UNFINISHED}{name}").mkdir()
            (tmp_path / f"{UNFINISHED}{name}" / "half").write_text("half")
        for name in names:
            (tmp_path / name).write_text("old")
        if names:
            with pytest.raises(ValueError, match="is not empty"), output_folder(tmp_path):
                pass
        else:
            with output_folder(tmp_path) as temporary:
                (temporary / "y").write_text("new")
        assert sorted(os.listdir(tmp_path)) == list(names or ("y",))

    def test_a_block_that_fails_leaves_no_folder(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out"):
            raise KeyboardInterrupt
        assert not os.listdir(tmp_path)


def test_threads_that_add_values_at_once_leave_a_whole_file(tmp_path):
    path, gate, wrong = tmp_path / "cache" / "values.json", threading.Barrier(6), []

    def work(name):
        gate.wait()
        try:
            for i in range(30):
                add_values(path, {f"{name}{i}": i})
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and read_values(path) and [each.name for each in path.parent.iterdir()] == [path.name]
