"""Measuring tuned schedules of timm models."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("timm")

import timm
import torch

from scripts.measure import tuned_timm
from scripts.measure.tuned_timm import measure
from visattn.models.tuning.pictures import Pictures
from visattn.models.tuning.subject import BackboneSubject
from visattn.patterns import parse
from visattn.tuned import Tuned
from visattn.tuning.goal import Goal


def test_a_schedule_and_its_figures_are_written(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=1)
    noise = torch.randn(6, 3, 32, 32)
    subject = BackboneSubject(model, Pictures(noise.__getitem__, 6, None, "noise"))
    options = SimpleNamespace(out=tmp_path, what="dinov2", seconds=100.0)
    measure(subject, Goal(psnr=10.0, held_out=3), 3, ("dense", "na(window=3x3)"), options)
    found = json.loads((tmp_path / "dinov2-results.json").read_text())
    assert found["verified"] == Tuned.read(tmp_path / "dinov2.json").verified and found["verified"]["samples"] == 3
    assert "attention_seconds_dense" in found["verified"] and found["about"]["grid"] == [4, 4]


def test_the_candidates_for_digits_are_patterns_of_their_grid():
    for text in (tuned_timm.SMALL[0].format(0.1), tuned_timm.SMALL[1].format(13)):
        parse(text).check((16, 16))
