"""Reports of GPU scripts that go on: what a file has is kept, and never mixed with cases of other versions."""

import json
import math

import pytest

from scripts.gpu_common import add_rows, go_on, measure_cases
from tests.support.places import ROOT


def report_of(**more):
    return {"versions": {"gpu": "one", "torch": "2"} | more.pop("versions", {}), "heads": 24, "cases": {}} | more


def test_cases_of_a_file_are_kept(tmp_path):
    out, first = tmp_path / "cases.json", report_of(versions={"peer": "1"})
    go_on(first, out)
    assert first["cases"] == {}
    measure_cases(["a", "b"], lambda name: {"ms": 1}, first, out, math.inf)
    # A peer that is not here any more, and one that was not.
    second = report_of(versions={"other": "3"})
    go_on(second, out)
    measure_cases(["b", "c"], lambda name: {"ms": 2}, second, out, math.inf)
    found = json.loads(out.read_text())
    assert {name: case["ms"] for name, case in found["cases"].items()} == {"a": 1, "b": 2, "c": 2}
    assert found["versions"] == {"gpu": "one", "torch": "2", "peer": "1", "other": "3"}


@pytest.mark.parametrize(
    ("more", "what"), [({"versions": {"torch": "3"}}, "torch '2', not '3'"), ({"heads": 8}, "heads 24, not 8")]
)
def test_cases_of_other_versions_are_neither_mixed_nor_lost(tmp_path, more, what):
    out = tmp_path / "cases.json"
    measure_cases(["a"], lambda name: {}, report_of(), out, math.inf)
    before = out.read_text()
    with pytest.raises(SystemExit, match=f"has rows of {what}: pass another --out"):
        go_on(report_of(**more), out)
    assert out.read_text() == before


def test_other_names_for_cases(tmp_path):
    out = tmp_path / "times.json"
    out.write_text(json.dumps(report_of(times={"a": 1})))
    report = report_of(times={})
    go_on(report, out, "times")
    assert report["times"] == {"a": 1}


def test_rows_of_the_same_case_replace_each_other(tmp_path):
    out = tmp_path / "new" / "rows.json"
    same = ("model", "grid")
    first = report_of(cases=[])
    go_on(first, out)
    add_rows(first, [{"model": "a", "grid": (4, 4), "ms": 1}, {"model": "b", "ms": 1}], same, out)
    second = report_of(cases=[])
    go_on(second, out)
    add_rows(second, [{"model": "a", "grid": (4, 4), "ms": 2}, {"model": "a", "grid": (8, 8), "ms": 3}], same, out)
    assert [(row["model"], row["ms"]) for row in json.loads(out.read_text())["cases"]] == [("a", 2), ("b", 1), ("a", 3)]


@pytest.mark.parametrize("room", ["bench", "check"])
def test_scripts_that_measure_a_part_overwrite_no_file(room):
    for script in (ROOT / "scripts" / room).glob("*_gpu.py"):
        text = script.read_text(encoding="utf-8")
        parts = '"--out"' in text and ('"--only"' in text or '"--budget"' in text) and "training" not in script.name
        assert not parts or any(word in text for word in ("go_on(", "earlier(", "check_same(")), script
