"""The table of dynamic and static patterns at equal densities: parameters that are searched for, rows, resuming."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure import dynamic_table
from scripts.measure.dynamic_table import DENSITIES, Family, main, rows_of
from scripts.measure.emoji_encoder_model import DualEncoder, save_encoder
from tests.support.tiny_emoji import narrow_encoder, tiny_pack
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn import Layout, parse
from visattn.simulate import simulate


@pytest.fixture(scope="module", autouse=True)
def _narrow_encoder():
    with narrow_encoder():
        yield


@pytest.mark.parametrize(("family", "density"), [(Family("topp(p={})", 0.0, 1.0), 0.3), (Family("a({})", 3, -1), 0.2)])
def test_a_parameter_is_halved_in_until_the_density_is_near(family, density):
    tried = []

    def reached(text):
        number = float(text.split("(")[1].split("=")[-1].rstrip(")"))
        tried.append(number)
        return (number - family.least) / (family.most - family.least)

    found = family.of_density(density, reached)
    assert abs(reached(found) - density) < 0.02
    assert len(tried) <= dynamic_table.HALVINGS + 1


def test_a_pattern_that_is_never_so_sparse_is_left_out():
    rows = {row.text: row for row in rows_of("clips", 0.3) if isinstance(row, Family)}
    with pytest.raises(ValueError, match=r"radial\(.*\) is 0.076 off 0.2"):
        rows["radial(decay={},block=8)"].of_density(0.2, lambda text: simulate(text, Layout((16, 16, 16))).density)
    # Nobody searches for it in vain.
    assert not any("radial" in str(row) for density in (0.1, 0.2) for row in rows_of("clips", density))


@pytest.mark.parametrize(("kind", "grid"), [("pictures", (64, 64)), ("clips", (16, 16, 16))])
@pytest.mark.parametrize("density", DENSITIES)
def test_rows_of_fixed_numbers_have_the_density_asked_for(kind, grid, density):
    for row in rows_of(kind, density):
        if isinstance(row, Family):
            for number in (row.least, row.most):
                parse(row.at(number))
        elif row.startswith("na"):
            assert abs(simulate(row, Layout(grid)).density - density) < 0.035
        else:
            parse(row)


def test_rows_are_tuned_measured_and_not_measured_twice(tmp_path, monkeypatch, capsys):
    tiny_pack(tmp_path / "pack")
    tiny_pixel_flux().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    save_encoder(DualEncoder(), tmp_path / "encoder.safetensors", {"steps": 0})
    rows = ["na(window=3x3)", Family("topp(p={},block=2x2)", 0.01, 0.99), "radial(decay=0.5)"]
    monkeypatch.setattr(dynamic_table, "rows_of", lambda kind, density: rows)
    # Of sixteen tokens no share of blocks is near one that is asked for.
    monkeypatch.setattr(dynamic_table, "FAR", 9.0)
    out = tmp_path / "table.json"
    words = f"--data {tmp_path}/pack --encoder {tmp_path}/encoder.safetensors --model {tmp_path}/model --sizes 32"
    words = f"pictures {words} --captions 2 --steps 2 --dense-steps 1 --threads 1 --densities 0.3 --out {out}".split()
    main(words)
    found = json.loads(out.read_text())
    assert found["tuned"]["topp(p={},block=2x2) at 0.3"].startswith("topp(p=0.")
    dense, sparse, dynamic, radial = found["rows"].values()
    assert dense["density"] == 1
    assert sparse["dense_steps"] == dynamic["dense_steps"] == 1
    assert dynamic["psnr"] > 0
    assert "frames of a video" in radial["error"]
    capsys.readouterr()
    before = out.read_text()
    rows.pop()
    main(words)
    assert out.read_text() == before
    assert "density" not in capsys.readouterr().out


def test_each_number_is_kept_as_soon_as_it_is_found():
    figures, kept = {}, []
    tuner = dynamic_table.Tuner(None, figures, 32, lambda: kept.append(dict(figures["tuned"])))
    tuner._reached = lambda text: float(text.removeprefix("a(").rstrip(")"))
    rows = [Family(text, 0.0, 1.0) for text in ("a({})", "a({} )")]
    assert [tuner.pattern(row, 0.5) for row in rows] == ["a(0.5)", "a(0.5 )"]
    assert [len(each) for each in kept] == [1, 2]
    tuner.pattern(rows[0], 0.5)
    assert len(kept) == 2
