"""Every registered backbone at its full size, without memory: configuration, head and number of parameters."""

import fnmatch
import inspect

import pytest

pytest.importorskip("timm")

import timm
import torch
from timm.models._manipulate import group_parameters

import visattn.models

# Millions of parameters in the papers' and repositories' tables (which cut dinat_large to 200 and round 22.65 up).
SIZES = {
    "nat_mini": 20, "nat_tiny": 28, "nat_small": 51, "nat_base": 90,
    "dinat_mini": 20, "dinat_tiny": 28, "dinat_small": 51, "dinat_base": 90, "dinat_large": 201,
    "dinat_s_tiny": 28, "dinat_s_small": 50, "dinat_s_base": 88, "dinat_s_large": 197,
    "biformer_tiny": 13.14, "biformer_small": 25.54, "biformer_base": 56.80, "biformer_stl": 28.37,
    "agent_deit_tiny": 6.02, "agent_deit_small": 22.65, "agent_deit_base": 87.2,
    "agent_swin_tiny": 28.90, "agent_swin_small": 50, "agent_swin_base": 88,
    "agent_pvt_tiny": 11.57, "agent_pvt_small": 20.6, "agent_pvt_medium": 35.9, "agent_pvt_large": 48.7,
    "mavit_tiny": 16.45, "mavit_small": 27.14, "mavit_base": 49.79, "mavit_large": 97.77,
    "fit_tiny": 7.11, "fit_small": 27.79, "fit_base": 109.85,
    "lrgt_tiny": 5.73, "lrgt_small": 22.07, "lrgt_base": 86.60,
    "flowformer_tiny": 43.31, "flowformer_small": 49.84,
    "moh_vit_small_80": 49.91, "moh_vit_small_75": 49.91, "moh_vit_base_75": 90.02, "moh_vit_base_50": 90.02,
}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def full(request):
    """A name and its model; no test changes it."""
    return request.param, timm.create_model(request.param, device="meta", dtype=torch.float32).eval()


def test_the_table_has_every_backbone():
    families = [
        module.__name__.rpartition(".")[2]
        for module in vars(visattn.models).values()
        if hasattr(module, "default_cfgs")
    ]
    assert set(SIZES) == {name for family in families for name in timm.list_models(module=family)}


def test_number_of_parameters(full):
    name, model = full
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    digits = len(str(SIZES[name]).partition(".")[2]) if isinstance(SIZES[name], float) else 0
    assert abs(millions - SIZES[name]) <= 0.51 * 10.0**-digits


def test_config_and_head(full):
    name, model = full
    cfg, keys = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in keys and f"{cfg['first_conv']}.weight" in keys
    assert model.in_chans == cfg["input_size"][0]
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_an_argument=1)
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    names = [n for n, _ in model.named_parameters()]
    assert len(set(group_parameters(model, model.group_matcher(coarse=False), reverse=True).values())) > 1
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) > 1
    assert all(any(fnmatch.fnmatch(n, pattern) for n in names) for pattern in model.no_weight_decay())
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
