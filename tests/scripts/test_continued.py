"""Files of results that runs add to: nothing of another device, version or setting is mixed in, and nothing is lost."""

import json

import pytest

from scripts.bench import suites_gpu
from scripts.continued import check_same, earlier

CPU = {"device": "cpu", "name": "A"}


def report_of(**more):
    versions = {"python": "3.11", "torch": "2", "timm": "1", "peer": None} | more.pop("versions", {})
    return {"versions": versions, "devices": [CPU, {"device": "cuda:0", "name": "G"}], "threads": 1} | more


def test_what_a_file_has_is_given_back(tmp_path):
    out = tmp_path / "rows.json"
    assert earlier(out, report_of(), "cpu") is None and earlier(None, report_of()) is None
    assert earlier(tmp_path / "new" / "rows.json", report_of(), "cpu") is None and (tmp_path / "new").is_dir()
    out.write_text(json.dumps(report_of(rows=[1])))
    now = report_of(versions={"python": "3.12", "peer": "1"}, devices=[CPU, {"device": "cuda:0", "name": "H"}])
    assert earlier(out, now, "cpu")["rows"] == [1]


@pytest.mark.parametrize(
    ("more", "on", "what"),
    [
        ({"versions": {"torch": "3"}}, "cpu", "has rows of torch '2', not '3'"),
        ({"versions": {"timm": "2"}}, "cpu", "has rows of timm '1', not '2'"),
        ({"devices": [{"device": "cpu", "name": "B"}]}, "cpu", "has rows of device 'A', not 'B'"),
        ({"devices": [CPU, {"device": "cuda:0", "name": "H"}]}, "cuda", "has rows of device 'G', not 'H'"),
        ({"devices": [CPU]}, "cuda:0", "has rows of device 'G', not None"),
        ({"threads": 2}, "cpu", "has rows of threads 1, not 2"),
        ({"settings": {"steps": (1, 2)}}, "cpu", "tells no steps"),
    ],
)
def test_other_machines_versions_and_settings_are_refused(tmp_path, more, on, what):
    with pytest.raises(ValueError, match=f"rows.json {what}: pass another --out, or move it"):
        check_same(report_of(), report_of(**more), tmp_path / "rows.json", on)


def test_settings_that_name_the_kind_of_device_alone_are_told_apart(tmp_path):
    then, now = (report_of(settings={"device": "cuda"}, devices=[{"device": "cuda:0", "name": n}]) for n in "GH")
    with pytest.raises(ValueError, match="device 'G', not 'H'"):
        check_same(then, now, tmp_path / "rows.json", "cuda")
    del then["devices"]
    with pytest.raises(ValueError, match="device 'cuda', not 'H'"):
        check_same(then, now, tmp_path / "rows.json", "cuda")


def test_a_file_that_tells_no_torch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tells no torch"):
        check_same({"rows": []}, {"torch": "2"}, tmp_path / "rows.json")


@pytest.mark.parametrize(("key", "value"), [("torch", "1.0"), ("suite", "cab")])
def test_suites_go_on_with_their_own_file_alone(tmp_path, monkeypatch, key, value):
    words = ["suites_gpu", "--suite", "longca", "--device", "cpu", "--backend", "sdpa", "--seconds", "1e-9"]
    out = tmp_path / "suite.json"
    about = {"versions": suites_gpu.versions(), "devices": suites_gpu.devices(), "suite": "longca", "results": []}
    monkeypatch.setattr("sys.argv", [*words, "--out", str(out)])
    out.write_text(json.dumps(about))
    suites_gpu.main()
    place = about["versions"] if key in about["versions"] else about
    place[key] = value
    out.write_text(before := json.dumps(about))
    with pytest.raises(SystemExit, match=f"has rows of {key} '{value}', not"):
        suites_gpu.main()
    assert out.read_text() == before
