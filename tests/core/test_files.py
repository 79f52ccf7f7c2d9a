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
    alone,
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
    with pytest.raises(ValueError, match=r"a\.safetensors does not exist: pass another"):
        read_tensors(path, "file of weights", "pass another")
    path.write_text("no tensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is no file of weights, or not whole \(.*\): pass another"):
        read_tensors(path, "file of weights", "pass another")
    save_file({"x": torch.arange(3)}, path, {"about": "all"})
    tensors, metadata = read_tensors(path, "file of weights", "pass another")
    assert metadata == {"about": "all"} and torch.equal(tensors.pop("x"), torch.arange(3)) and not tensors
    save_file({}, path)
    assert read_tensors(path, "file of weights", "pass another") == ({}, {})


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


HALF = """
import sys, time
from pathlib import Path
from visattn.files import written_whole
with written_whole(Path(sys.argv[1])) as path:
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


class TestInterruptedRuns:
    def test_what_a_killed_writer_left_goes_with_the_next_and_what_one_writes_stays(self, tmp_path):
        path, other = tmp_path / "a.txt", tmp_path / "b.txt"
        process = subprocess.Popen([sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "writing\n"
            with written_whole(path) as temporary:
                temporary.write_text("whole")
            (half,) = tmp_path.glob(f"{UNFINISHED}*")
            assert half.read_text() == "half"
            prepare_folder(tmp_path, force=True)
            assert half.is_file()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for written, left in ((other, {"a.txt", "b.txt", half.name}), (path, {"a.txt", "b.txt"})):
            with written_whole(written) as temporary:
                temporary.write_text("whole")
            assert set(os.listdir(tmp_path)) == left

    def test_folders_hold_no_half_files_of_killed_writers(self, tmp_path):
        (tmp_path / f"{UNFINISHED}a-12345678.txt").write_text("half")
        prepare_folder(tmp_path)
        assert not os.listdir(tmp_path)

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


class TestAlone:
    @pytest.mark.parametrize("name", ["folder", "file"])
    def test_a_second_run_is_refused_until_the_first_has_ended(self, tmp_path, name):
        path = tmp_path / name
        (path.mkdir if name == "folder" else path.touch)()
        with alone(path):
            with pytest.raises(ValueError, match=f"another run is writing to .*{name}: wait until"), alone(path):
                pass
            assert path.exists()
        with alone(path):
            pass
        assert path.exists()

    def test_nothing_but_what_the_block_writes_is_left(self, tmp_path):
        path = tmp_path / "file"
        with alone(path):
            assert not path.exists() and os.listdir(tmp_path)
        assert not os.listdir(tmp_path)
        with alone(path):
            path.write_text("x")
        assert path.read_text() == "x" and os.listdir(tmp_path) == ["file"]

    def test_a_file_that_its_run_replaces_is_still_that_run_s(self, tmp_path):
        path = tmp_path / "file.json"
        with alone(path):
            for value in (1, 2):
                write_json(path, value)
                with pytest.raises(ValueError, match=r"another run is writing to .*file\.json: wait"), alone(path):
                    pass
        with alone(path):
            assert path.read_text() == "2\n"

    def test_what_a_killed_run_has_left_locks_nothing(self, tmp_path):
        (tmp_path / f"{UNFINISHED}file.json.lock").touch()
        with alone(tmp_path / "file.json"):
            pass
        assert not os.listdir(tmp_path)

    def test_runs_that_begin_at_once_share_no_folder(self, tmp_path):
        gate, went, refused = threading.Barrier(8), [], []

        def run(number):
            gate.wait()
            try:
                with output_folder(tmp_path / "out", force=True) as folder:
                    (folder / f"{number}").write_text("x")
                    ended.wait(5)
                went.append(f"{number}")
            except ValueError as error:
                refused.append(str(error))
                if len(refused) == 7:
                    ended.set()

        ended = threading.Event()
        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.listdir(tmp_path / "out") == went and len(went) == 1
        assert all("another run is writing to" in text for text in refused)


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
