"""The estimate of a layer on several GPUs: against what two were measured at, and what it says of itself."""

import pytest

pytest.importorskip("triton")

from scripts.results import result
from visattn import Layout
from visattn.kernels.triton.scaling import scaling

SMALL = Layout((8, 24, 32))


def test_two_gpus_are_estimated_as_they_were_measured():
    rows = {
        (row["way"], "x".join(map(str, row["grid"]))): row
        for row in result("h200-x2-parallel")["rows"]
        if row["pattern"] == "na(window=11x23x23)"
    }
    grid = Layout((21, 45, 80))
    for way in ("halo", "ulysses"):
        measured = rows[way, "21x45x80"]
        one, two = scaling("na(window=11x23x23)", grid, 2, way, "h200", heads=12).strong
        assert one.speedup == 1
        # The stack has two layers.
        assert 2 * two.sent == measured["bytes_per_rank"]
        assert two.speedup == pytest.approx(measured["speedup"], rel=0.12)


def test_links_cost_what_nothing_hides():
    found = {link: scaling("na(window=5x9x9)", SMALL, 8, "halo", link=link) for link in ("nvlink", "pcie", "ib")}
    assert [one.gpus for one in found["pcie"].strong] == [1, 2, 4, 8]
    assert found["pcie"].strong[2].sent == 2 * found["pcie"].strong[1].sent
    assert found["pcie"].strong[1].exposed >= found["nvlink"].strong[1].exposed
    assert found["pcie"].weak[3].grid == (8, 24, 256)
    assert any("assumed" in line for line in found["ib"].assumed)


def test_a_step_is_its_layers_on_up_to_64_gpus():
    grid = Layout((4, 8, 64))
    one, step = (scaling("na(window=3x3x3)", grid, 64, layers=layers) for layers in (1, 30))
    assert [row.gpus for row in step.strong] == [row.gpus for row in step.weak] == [1, 2, 4, 8, 16, 32, 64]
    for layer, whole in zip((*one.strong, *one.weak), (*step.strong, *step.weak), strict=True):
        assert whole.milliseconds == pytest.approx(30 * layer.milliseconds)
        assert whole.sent == 30 * layer.sent and whole.efficiency == pytest.approx(layer.efficiency)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"link": "wifi"}, "link 'wifi' has no record: pass one of nvlink"),
        ({"parallel": "ring"}, "must be halo or ulysses"),
        ({"gpus": 65}, "pass 2 to 64"),
        ({"pattern": "topk(keep=0.5, block=2x2x2)"}, "use Ulysses"),
    ],
)
def test_what_has_no_record_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        scaling(given.pop("pattern", "na(window=5x9x9)"), SMALL, **given)
