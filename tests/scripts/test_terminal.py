"""Pictures of terminals: what was printed is in them, and they ask no other host for anything."""

import re

import pytest

from scripts.terminal import main


def test_a_picture_has_what_was_printed_and_loads_nothing(tmp_path):
    main([str(tmp_path / "a.svg"), "echo first", "echo second; echo aside >&2"])
    picture = (tmp_path / "a.svg").read_text().replace("&#160;", " ")
    assert [picture.count(word) for word in ("echo first", "first", "second", "aside")] == [1, 2, 2, 1]
    assert not re.search(r"url\((?!#)|@import|href=", picture) and "@font-face" not in picture
    with pytest.raises(SystemExit, match="exit status 3"):
        main([str(tmp_path / "b.svg"), "exit 3"])
    assert not (tmp_path / "b.svg").exists()
