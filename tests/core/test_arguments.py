"""Every public function tells a wrong argument by its name, what was expected and the fix, in one line."""

import inspect
import tempfile
from pathlib import Path

import pytest
import timm
import torch

import visattn
from tests.support.arguments import fault
from visattn import Layout, maps
from visattn.models.layers import ELA, GAAM, ULSAM
from visattn.models.swap.records import RECORDS
from visattn.parallel import Moved, Slabs, best_axis, halo_needs, refusal
from visattn.patterns import routed_mask
from visattn.patterns.centroids import followed
from visattn.pipelines.decoders import patch_decoder
from visattn.pipelines.schedulers import BDIAScheduler, EDICTScheduler
from visattn.recorded import Recorded, Recorder, load_recorded, save_recorded
from visattn.show import draw
from visattn.simulate import advise, simulate

LAYOUT = Layout((4, 5))
Q = torch.randn(1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
WINDOW, BLOCKS = "na(window=3)", "topk(keep=0.5, block=2)"
CALL = Recorded("blocks.0.attn", None, 0, Q, Q, Q, LAYOUT, 8**-0.5)
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SLABS = Slabs(LAYOUT, 0, (2, 2))
FOLDER = Path(tempfile.mkdtemp())
RECORD = RECORDS["timm.layers.attention.Attention"]
OVERVIEW = maps.overview([CALL], [WINDOW])


def small():
    options = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


MODEL = small()
PATCHED = visattn.apply(small(), "sigmoid(sparse=na(window=3))", untrained=True)
QK = {"q": Q, "k": Q}
ON = {"layout": LAYOUT}
LOOKED = {"model": MODEL, "forward": lambda: MODEL(IMAGES), "layers": None}
# Function, and arguments that it takes; those that are left out have defaults.
FUNCTIONS = {
    "attention": (visattn.attention, {**QK, "v": Q, "pattern": WINDOW, **ON}),
    "explain": (visattn.explain, {"pattern": WINDOW, **ON, "q": Q}),
    "attention_rows": (visattn.attention_rows, {**QK, "pattern": WINDOW, **ON, "rows": [1]}),
    "tile_choice": (visattn.tile_choice, {**QK, "pattern": WINDOW, **ON}),
    "tile_choice of a routed pattern": (visattn.tile_choice, {**QK, "pattern": BLOCKS, **ON}),
    "dense_mask": (visattn.dense_mask, {"pattern": WINDOW, **ON}),
    "routed_mask": (routed_mask, {"pattern": BLOCKS, **ON, **QK}),
    "parse": (visattn.parse, {"text": WINDOW}),
    "plan": (visattn.plan, {"pattern": WINDOW, **ON}),
    "Layout": (Layout, {"grid": (4, 5)}),
    "Layout.with_keys": (LAYOUT.with_keys, {"key_layout": None}),
    "Layout.check_length": (lambda length: LAYOUT.check_length(length), {"length": 20}),
    "apply": (visattn.apply, {"target": small(), "pattern": WINDOW}),
    "register": (visattn.register, {"pattern": WINDOW}),
    "convert_heads": (visattn.convert_heads, {"model": small(), "query_heads": 1}),
    "Handle.set_step": (PATCHED.set_step, {"step": 0}),
    "Handle.watch": (PATCHED.watch, {"watcher": None}),
    "Handle.save": (PATCHED.save, {"path": "nowhere/weights.safetensors"}),
    "register_pattern": (visattn.register_pattern, {"kind": int}),
    "register_backend": (visattn.register_backend, {"backend": 3}),
    "register_family": (visattn.register_family, {"family": 3}),
    "register_attention": (visattn.register_attention, {"kind": "module.name", "record": RECORD}),
    "register_adapter": (visattn.register_adapter, {"package": "nobody", "install": print}),
    "maps.calls": (maps.calls, LOOKED),
    "maps.pruning": (maps.pruning, LOOKED),
    "maps.gradient": (maps.gradient, {**LOOKED, "probes": 1}),
    "maps.spread": (maps.spread, {"call": CALL}),
    "maps.caught": (maps.caught, {"call": CALL, "pattern": WINDOW}),
    "maps.received": (maps.received, {"call": CALL, "weights": torch.ones(1, 1, 20)}),
    "maps.rollout": (maps.rollout, {"calls": [CALL]}),
    "maps.rows": (maps.rows, {"call": CALL, "tokens": [1]}),
    "maps.offsets": (maps.offsets, {"call": CALL}),
    "maps.overview": (maps.overview, {"calls": [CALL]}),
    "maps.Overview.table": (OVERVIEW.table, {}),
    "maps.Overview.schedule": (OVERVIEW.schedule, {}),
    "maps.Overview.candidates": (OVERVIEW.candidates, {}),
    "maps.average_drop": (maps.average_drop, {"plain": torch.ones(3), "masked": torch.ones(3)}),
    "maps.confidence_gain": (maps.confidence_gain, {"plain": torch.ones(3), "masked": torch.ones(3)}),
    "maps.top_share": (maps.top_share, {"maps": torch.ones(2, 3), "share": 0.5}),
    "simulate": (simulate, {"pattern": WINDOW, **ON}),
    "advise": (advise, {"pattern": WINDOW, **ON}),
    "draw": (draw, {"pattern": WINDOW, **ON}),
    "Recorder": (Recorder, {}),
    "save_recorded": (save_recorded, {"path": FOLDER / "calls.safetensors", "calls": [CALL], "force": True}),
    "load_recorded": (load_recorded, {"path": "nobody.safetensors"}),
    "Slabs": (Slabs, {"layout": LAYOUT, "axis": 0, "sizes": (2, 2)}),
    "Slabs.even": (Slabs.even, {"layout": LAYOUT, "ranks": 2}),
    "Slabs.start": (SLABS.start, {"rank": 0}),
    "Slabs.grid": (SLABS.grid, {"rows": 2}),
    "Slabs.local": (SLABS.local, {"rank": 0}),
    "Slabs.shard": (SLABS.shard, {"x": Q, "rank": 0}),
    "Slabs.joined": (SLABS.joined, {"parts": [Q[:, :10], Q[:, 10:]]}),
    "best_axis": (best_axis, {"layout": LAYOUT, "ranks": 2}),
    "halo_needs": (halo_needs, {"pattern": WINDOW, "slabs": SLABS, "rank": 0}),
    "refusal": (refusal, {"pattern": WINDOW, "slabs": SLABS}),
    "Moved.add": (Moved().add, {}),
    "followed": (followed, {"centroids": torch.randn(2, 3, 8), **QK, **ON}),
    "patch_decoder": (patch_decoder, {"model": MODEL}),
    "EDICTScheduler": (lambda mixing: EDICTScheduler(mixing), {"mixing": 0.9}),
    "BDIAScheduler": (lambda gamma: BDIAScheduler(gamma), {"gamma": 1.0}),
    "ELA": (ELA, {"channels": 16}),
    "ULSAM": (ULSAM, {"channels": 16}),
    "GAAM": (GAAM, {"channels": 16}),
}
# What torch itself checks, and what only processes of a group can be asked.
THEIRS = ("device", "dtype", "mesh")


def arguments():
    for name, (function, given) in FUNCTIONS.items():
        for argument in inspect.signature(function).parameters:
            if argument not in THEIRS:
                yield pytest.param(function, given, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize(("function", "given", "argument"), arguments())
def test_wrong_values_are_told_in_a_line(function, given, argument):
    assert fault(function, given, argument) is None


def test_every_public_function_is_looked_at():
    known = {name.partition(".")[0] for name in FUNCTIONS}
    # Pipelines are asked in tests/pipelines/test_wrong_arguments.py.
    elsewhere = {"guide", "clear_caches", "backends", "plugins", "Handle", "HeadConversion", "TilePlan"}
    names = {name for name in visattn.__all__ if callable(getattr(visattn, name))}
    assert not names - known - elsewhere
    own = {name for name in maps.__all__ if inspect.isfunction(getattr(maps, name))}
    assert not own - {name.partition(".")[2] for name in FUNCTIONS}
