"""Reports of GPU scripts that go on: what a file has is kept, and never mixed with cases of other versions."""

import json
import math

import pytest

from scripts.gpu_common import go_on, measure_cases


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
