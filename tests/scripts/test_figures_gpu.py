"""The tables of the GPU's figures: peers that were measured, and rows that were."""

import json

from scripts import figures_gpu
from scripts.results import RESULTS

TIMES = {"triton": (10.0, 40.0), "cudnn": (80.0, 240.0), "natten": (20.0, 80.0)}


def case(**more):
    times = {who: {"forward_ms": a, "backward_ms": b} for who, (a, b) in TIMES.items()}
    shape = {"pattern": "na(window=80x80)", "layout": "256x256", "tile_bound": 8.4, "full_share": 0.66}
    return {**shape, **times, "tflops_visited": 600.0, "floor_ms": {"arithmetic": 6.5, "bytes": 0.5}, **more}


def shown(monkeypatch, cases):
    versions = {"gpu": "A card", "torch": "2.11", "triton": "3.6", "natten": "0.21.7", "flash-attn-4": "4.0"}
    monkeypatch.setattr(figures_gpu, "result", lambda name: {"versions": versions, "cases": cases})


def test_packages_that_refuse_and_cases_that_failed_have_no_figures(monkeypatch):
    refused = {"natten": {"error": "ValueError: NATTEN runs na(...) only, not clear"}}
    blocks = {"fa4": {"forward_ms": 16.0, "backward_ms": 60.0}}
    # Where neither of them ran there is nothing to compare.
    cases = {"flux-s1": case(), "clear16-256": case(**refused, **blocks), "clear8-256": case(**refused)}
    shown(monkeypatch, {**cases, "dense-64k": {"failed": "out of memory"}})
    head, _, *rows, _, machine = figures_gpu.gpu_packages_table().splitlines()
    assert "| NATTEN 0.21.7 | FlashAttention-4 4.0 |" in head
    ours = "8.0x / 6.0x"
    assert [row.split(" | ")[2:5] for row in rows] == [[ours, "4.0x / 3.0x", ""], [ours, "", "5.0x / 4.0x"]]
    assert machine == "A card, torch 2.11, triton 3.6."


def test_peers_without_times_have_empty_cells(monkeypatch):
    flash = {"flash": {"forward_ms": 160.0, "backward_ms": 400.0}}
    shown(monkeypatch, {"flux-s1": case(**flash), "hunyuan-s1": case(), "dense-64k": {"failed": "out of memory"}})
    _, _, *rows, _, _ = figures_gpu.gpu_peers_table().splitlines()
    assert [row.split(" | ")[3:11] for row in rows] == [
        ["10.00", "8.0x", "16.0x", "", "40.00", "6.0x", "10.0x", ""],
        ["10.00", "8.0x", "", "", "40.00", "6.0x", "", ""],
    ]


def test_results_that_name_a_gpu_are_of_it():
    named = [file for file in RESULTS.glob("*.json") if file.name.startswith(("h100", "h200"))]
    found = {file.name: json.loads(file.read_text()) for file in named}
    gpus = {name: each.get("versions", each)["gpu"] for name, each in found.items() if "suite" not in each}
    gpus |= {name: each["devices"][-1]["name"] for name, each in found.items() if "suite" in each}
    assert gpus and not {name: gpu for name, gpu in gpus.items() if name[:4].upper() not in gpu}
