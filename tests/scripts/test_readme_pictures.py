"""The README's pictures: a row for each pattern, a column for each prompt, the same noise in all rows."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts import readme_pictures
from scripts.readme_pictures import SHEETS, Sheet, main
from scripts.results import ROOT
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from tests.support.tiny_pixel_wan_text import tiny_pixel_wan_text
from visattn import parse

ROWS = (("dense", 0.0), ("na(window=16x16)", 0.0), ("na(window=3x3)", 0.0))


def cells(picture, columns):
    """Pixels of the drawn cells, by row and column."""
    side, step = readme_pictures.SHOWN, readme_pictures.SHOWN + 4
    whole = np.asarray(picture.convert("RGB")).astype(int)
    first = whole.shape[0] - 8 - side
    height = (whole.shape[0] - 16 + 4) // len(ROWS)
    tops = [first - height * i for i in reversed(range(len(ROWS)))]
    return [[whole[y : y + side, 8 + step * x : 8 + step * x + side] for x in range(columns)] for y in tops]


def test_rows_are_patterns_from_the_same_noise(tmp_path, monkeypatch):
    tiny_pixel_flux().save_pretrained(tmp_path / "model")
    sheet = Sheet(str(tmp_path / "model"), "made.png", ("red disc", "blue bar"), ROWS)
    monkeypatch.setitem(SHEETS, "pictures", sheet)
    main(["--kinds", "pictures", "--steps", "2", "--size", "32", "--out", str(tmp_path / "out")])
    dense, whole, sparse = cells(Image.open(tmp_path / "out/made.png"), 2)
    assert np.abs(dense[0] - dense[1]).max() > 20
    for one, same, other in zip(dense, whole, sparse, strict=True):
        assert np.abs(one - same).max() <= 2
        assert np.abs(one - other).max() > 2


def test_clips_become_an_animation(tmp_path, monkeypatch):
    tiny_pixel_wan_text().save_pretrained(tmp_path / "model")
    sheet = Sheet(str(tmp_path / "model"), "made.webp", ("rocket",), (("dense", 0.0), ("na(window=3x3x3)", 0.5)))
    monkeypatch.setitem(SHEETS, "clips", sheet)
    main(["--kinds", "clips", "--steps", "2", "--size", "16", "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out/made.webp") as made:
        assert made.n_frames > 1


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=list(SHEETS))
def test_the_pictures_are_those_of_the_readme(sheet):
    assert f"docs/pictures/{sheet.file}" in (ROOT / "README.md").read_text()
    assert all(parse(pattern) for pattern, _ in sheet.rows)
