"""Files are whole or absent, and checked before anything is computed."""

import os

import pytest

from visattn.files import check_writable_file, prepare_folder, written_whole


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
