"""Functions of pipelines tell wrong arguments by their name, before they draw anything."""

import functools
import inspect

import diffusers
import pytest
import torch

import visattn
from tests.support import tiny_models, tiny_pipelines
from tests.support.arguments import Ran, fault
from visattn import guide
from visattn.pipelines.at_step import at_step
from visattn.pipelines.control import style_transfer
from visattn.pipelines.guidance.search import find_heads

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pipe():
    class Pipeline(diffusers.StableDiffusionPipeline):
        @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
        def __call__(self, *args, **kwargs):
            raise Ran

    stock = tiny_pipelines.stable_diffusion()[0]
    return Pipeline(**stock.components, requires_safety_checker=False)


def objective(pictures, prompts):
    return torch.zeros(len(prompts))


FUNCTIONS = {
    guide: {},
    at_step: {"arguments": {}, "step": 0},
    style_transfer: {"content": PICTURE, "style": PICTURE, "steps": 5, "height": 16, "width": 16},
    find_heads: {"prompts": ["a"], "objective": objective, "seeds": (2,), "most": 1},
}
ARGUMENTS = [
    pytest.param(function, argument, id=f"{function.__name__}-{argument}")
    for function, given in FUNCTIONS.items()
    for argument in (*inspect.signature(function).parameters, *(name for name in ("height", "width") if name in given))
    if argument != "options"
]


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_wrong_values_are_told_in_a_line(function, argument, pipe, tmp_path, monkeypatch):
    # Text is the name of a file.
    monkeypatch.chdir(tmp_path)
    given = {"pipe": pipe, **FUNCTIONS[function]} | ({"out": tmp_path / "a.jsonl"} if function is find_heads else {})
    assert fault(function, given, argument) is None


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))


@pytest.mark.parametrize(
    ("wrap", "path"),
    [(torch.nn.DataParallel, "module"), (lora, "base_model.model"), (lambda model: torch.nn.Sequential(model), "0")],
)
def test_what_wraps_a_model_is_told_where_it_is(wrap, path):
    """PeftModel takes a class of transformers, and is no model of it."""
    wrapper = wrap(tiny_models.flux()[0])
    told = rf"it holds a FluxTransformer2DModel: target.get_submodule\('{path}'\)"
    with pytest.raises(ValueError, match=told):
        visattn.apply(wrapper, "na(window=3x3)")
    with visattn.apply(wrapper.get_submodule(path), "na(window=3x3)") as handle:
        assert len(handle.report().modules) == 3


def test_a_model_with_a_backbone_inside_is_told_where_it_is():
    timm = pytest.importorskip("timm")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("vit_tiny_patch16_224", depth=1)

    with pytest.raises(ValueError, match=r"\.Net: .*it holds a VisionTransformer: target.get_submodule\('backbone'\)"):
        visattn.apply(Net(), "na(window=3x3)")
