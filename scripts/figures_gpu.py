"""The tables of what was measured on a GPU."""

from __future__ import annotations

from typing import Any

from scripts.results import RESULTS, result, table

STACKS = {"flux": "FLUX size", "wan": "Wan 1.3B size"}


# What scripts/bench/gpu.py measured.
MEASURED = "h200"


def _faster(case: dict[str, Any], who: str, than: str) -> list[str]:
    """How many times faster a contender is than another, forward and backward; empty where one of them has no time."""
    keys = ("forward_ms", "backward_ms")
    own, other = (case.get(name, {}) for name in (who, than))
    return [f"{other[key] / own[key]:.1f}x" if key in own and key in other else "" for key in keys]


def _cases(name: str) -> dict[str, dict[str, Any]]:
    """The cases of a result that were measured."""
    return {key: case for key, case in result(name)["cases"].items() if "triton" in case}


def gpu_packages_table() -> str:
    """The Triton engine, NATTEN, FlashAttention-4 and FlexAttention against cuDNN, whole calls."""
    versions, rows = result(MEASURED)["versions"], []
    ours = {"triton": "visattn", "natten": f"NATTEN {versions['natten']}"}
    named = ours | {"fa4": f"FlashAttention-4 {versions['flash-attn-4']}", "flex": "FlexAttention"}
    for case in _cases(MEASURED).values():
        if not any("forward_ms" in case.get(who, {}) for who in ("natten", "fa4")):
            continue
        times = f"{case['triton']['forward_ms']:.1f} ms, {case['cudnn']['forward_ms']:.1f} ms"
        cells = [" / ".join(filter(None, _faster(case, who, "cudnn"))) for who in named]
        rows.append([f"`{case['pattern']}` on {case['layout']}", f"{case['tile_bound']:.1f}x", *cells, times])
    made = table(["case", "tile bound", *named.values(), "forward time, cuDNN's"], rows)
    return made + _machine(MEASURED)


def gpu_peers_table() -> str:
    """All cases of scripts/bench/gpu.py against cuDNN, flash and FlexAttention, and the two floors."""
    rows, peers = [], {"cudnn": "cuDNN", "flash": "flash", "flex": "flex"}
    for case in _cases(MEASURED).values():
        own, floors = case["triton"], case["floor_ms"]
        cells = [f"`{case['pattern']}` on {case['layout']}", f"{case['tile_bound']:.1f}x", f"{case['full_share']:.0%}"]
        forward, backward = zip(*(_faster(case, "triton", who) for who in peers), strict=True)
        cells += [f"{own['forward_ms']:.2f}", *forward, f"{own['backward_ms']:.2f}", *backward]
        floor = f"{floors['arithmetic']:.2f}, {floors['bytes']:.2f}"
        rows.append([*cells, f"{case['tflops_visited']:.0f}", floor])
    way = [f"than {name}" for name in peers.values()]
    head = ["case", "tile bound", "no mask", "forward, ms", *way, "backward, ms", *way, "TFLOP/s", "floors, ms"]
    return table(head, rows) + _machine(MEASURED)


def gpu_causal_table() -> str:
    """Causal linear attention by its kernels, against the tiled form in torch and dense attention."""
    if not (RESULTS / "h200-causal.json").exists():
        return "Not measured on a GPU yet."
    found, rows = result("h200-causal"), []
    for name, times in found["times"].items():
        own, plain, dense = (times[who] for who in ("triton", "torch", "dense"))
        cells = [name.removeprefix("causal ")]
        for key in ("forward_ms", "backward_ms"):
            cells.append(f"{own[key]:.2f} ms, {plain[key]:.2f} ms: {plain[key] / own[key]:.1f}x")
        rows.append([*cells, f"{dense['forward_ms']:.2f} ms: {dense['forward_ms'] / own['forward_ms']:.1f}x"])
    head = ["grid", "forward: ours, torch's", "backward: ours, torch's", "dense forward"]
    return table(head, rows) + f"\n\n{found['versions']['gpu']}, torch {found['versions']['torch']}."


def gpu_shapes_table() -> str:
    """Head dims, few tokens, batches and blocks by scores: rates over visited tiles, and against cuDNN."""
    rows = []
    for case in _cases("h200-shapes").values():
        own, shape = case["triton"], f"{case['batch']} x {case['heads']} x {case['head_dim']}"
        cells = [f"`{case['pattern']}` on {case['layout']}", shape]
        for way, faster in zip(("forward", "backward"), _faster(case, "triton", "cudnn"), strict=True):
            rate = case.get(f"{way}_tflops")
            cells.append(f"{own[f'{way}_ms']:.2f} ms, {faster}" + (f", {rate:.0f} TFLOP/s" if rate else ""))
        rows.append(cells)
    head = ["case", "samples, heads, head dim", "forward, times cuDNN's", "backward, times cuDNN's"]
    return table(head, rows) + _machine("h200-shapes") + " A backward counts as 2.5 forwards."


def gpu_stack_table() -> str:
    """Whole models of random weights, measured by scripts/bench/stack_gpu.py."""
    found: dict[tuple[str, str], dict[str, dict[str, dict[str, float]]]] = {}
    for case in result("h100-stack")["cases"]:
        key = STACKS[case["model"]], f"{'x'.join(map(str, case['grid']))}"
        way = "compiled" if case["compiled"] else "eager"
        found.setdefault(key, {}).setdefault(case["pattern"], {})[way] = case
    rows = []
    for (model, grid), patterns in found.items():
        for pattern, of in patterns.items():
            cells = [model, grid, "dense" if pattern == "dense" else f"`{pattern}`"]
            for way in ("eager", "compiled"):
                time = of[way]["model_ms"]
                faster = "" if pattern == "dense" else f": {patterns['dense'][way]['model_ms'] / time:.1f}x"
                cells.append(f"{time / 1e3:.2f} s{faster}")
            cells += [f"{of[way]['peak_gb'] - of[way]['weights_gb']:.2f} GB" for way in ("eager", "compiled")]
            rows.append(cells)
    return table(["model", "grid", "attention", "a step, eager", "compiled", "memory, eager", "compiled"], rows)


def gpu_calls_table() -> str:
    """What a call costs the host, in all and the GPU alone, measured by scripts/check/prepared_gpu.py."""
    columns = {
        "host": "host_us",
        "wall": "wall_us",
        "GPU": "gpu_us",
        "dense: host": "sdpa_host_us",
        "dense: wall": "sdpa_wall_us",
        "forward with gradient: host": "forward_grad_host_us",
        "dense": "forward_grad_sdpa_host_us",
        "backward: host": "backward_host_us",
        "dense ": "backward_sdpa_host_us",
        "engine alone": "backward_engine_host_us",
    }
    found = result("h200-calls")["rows"]
    columns = {head: key for head, key in columns.items() if key in found[0]}
    head = ["case", "heads", *(name.strip() for name in columns)]
    rows = []
    for row in found:
        case = f"`{row['pattern']}` on {row['layout']}"
        rows.append([case, row["heads"], *(f"{row[key]:.0f}" for key in columns.values())])
    return table(head, rows) + _machine("h200-calls")


def gpu_parallel_table() -> str:
    """Block stacks on two GPUs, measured by scripts/bench/parallel_gpu.py."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in result("h200-x2-parallel")["rows"]:
        key = STACKS[row["model"]], "x".join(map(str, row["grid"]))
        found.setdefault(key, {}).setdefault(row["pattern"], []).append(row)
    rows = []
    for (model, grid), patterns in found.items():
        dense = next((one["step_ms"] for one in patterns.get("dense", ()) if one["way"] == "one GPU"), None)
        for pattern, ways in patterns.items():
            for way in ways:
                what = "dense" if pattern == "dense" else f"`{pattern}`"
                cells = [model, grid, what, way["way"], f"{way['step_ms']:.1f} ms"]
                cells.append(f"{way['speedup']:.2f}x ({way['efficiency']:.0%})" if "speedup" in way else "")
                cells.append("" if dense is None else f"{dense / way['step_ms']:.1f}x")
                cells.append(f"{way['bytes_per_rank'] / 1e6:.0f} MB" if "bytes_per_rank" in way else "")
                cells.append(f"{way['exchange_ms']:.2f} ms" if "exchange_ms" in way else "")
                cells.append(f"{way['hidden']:.0%}" if "hidden" in way else "")
                rows.append(cells)
    head = ["stack", "grid", "attention", "way", "a step", "against one GPU", "against dense on one", "sent by a GPU"]
    return table([*head, "exchange alone, a layer", "hidden"], rows) + _machine("h200-x2-parallel")


def gpu_real_table() -> str:
    """Denoising steps of real diffusers classes, measured by scripts/bench/real_models_gpu.py."""
    if not (RESULTS / "h200-real-models.json").exists():
        return "Not measured: the command above writes the results of which this table is made."
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in result("h200-real-models")["rows"]:
        found.setdefault((row["model"], row["attention"]), {})[row["mode"]] = row
    rows = []
    for (model, attention), of in found.items():
        any_mode = next(iter(of.values()))
        cells = [model, "dense" if attention == "dense" else f"`{attention}`", f"{any_mode['attention_ms']:.0f} ms"]
        for mode in ("eager", "compiled"):
            if mode not in of:
                cells += ["", ""]
                continue
            stock, ms = of[mode]["stock_ms"], of[mode]["ms"]
            speedup = of[mode].get("speedup", stock / ms)
            bound = stock / max(stock - of[mode]["attention_ms"], 1e-9)
            cells += [f"{stock:.0f} to {ms:.0f} ms: {speedup:.2f}x", f"{bound:.2f}x"]
        rows.append(cells)
    head = ["model", "attention", "stock attention of a step", "a step, eager", "bound", "compiled blocks", "bound"]
    return table(head, rows) + _machine("h200-real-models")


def _machine(name: str) -> str:
    """A line that says what a result was measured on."""
    found = result(name)["versions"]
    also = f", diffusers {found['diffusers']}" if "diffusers" in found else ""
    return f"\n\n{found['gpu']}, torch {found['torch']}, triton {found['triton']}{also}."


def gpu_hopper_table() -> str:
    """The Hopper kernels and other ways to launch them, measured by scripts/bench/hopper_gpu.py."""
    rows = []
    for case in result("h200-hopper")["cases"].values():
        cells = [f"`{case['pattern']}` on {case['layout']}", str(case["head_dim"])]
        for direction in ("forward", "key_grad", "query_grad", "backward"):
            ms = case.get(direction, {}).get("ms", {})
            others = [f"{name} {ms[name]:.3g}" for name in sorted(ms, key=ms.__getitem__) if name != "shipped"][:2]
            cells.append("; ".join([f"**{ms['shipped']:.3g}**", *others]) if ms else "")
        dense = case["cudnn"]
        cells.append(f"{dense['forward_ms']:.3g}, {dense['backward_ms']:.3g}")
        rows.append(cells)
    return table(["case", "head dim", "forward", "dK/dV", "dQ", "backward", "cuDNN dense"], rows)
