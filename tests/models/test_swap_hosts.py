"""Swapped timm models next to what others do to them: accelerate's hooks, shared modules, copies, meta tensors."""

import copy
import pickle

import pytest

pytest.importorskip("timm")
pytest.importorskip("accelerate")

import accelerate
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook_on_blocks, remove_hook_from_module

import visattn
from tests.models.test_swap import SWINS, make_swin
from tests.models.test_swap_lifetime import X, make

PATTERN = "na(window=3)"
SWIN = "swin_tiny_patch4_window7_224"


def swin():
    return make_swin(SWIN), torch.randn(
        1, 3, *[SWINS[SWIN]["img_size"]] * 2, generator=torch.Generator().manual_seed(1)
    )


def vit():
    return make(), X


MODELS = pytest.mark.parametrize("build", [vit, swin])


def hooked(model):
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook(), append=True)


@MODELS
@torch.no_grad()
def test_hooks_of_accelerate_on_a_swapped_model(build):
    model, x = build()
    stock = model(x)
    handle = visattn.apply(model, PATTERN)
    swapped = model(x)
    assert not torch.equal(swapped, stock)
    hooked(model)
    assert torch.equal(model(x), swapped)
    handle.remove()
    assert torch.equal(model(x), stock), "the hooks have kept the forward of the swapped class"
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), stock)
    # What the hooks leave behind is the forward of the class.
    with visattn.apply(model, PATTERN, strict=True):
        assert torch.equal(model(x), swapped)
    assert torch.equal(model(x), stock)


@MODELS
@torch.no_grad()
def test_a_model_that_had_hooks_of_accelerate(build):
    model, x = build()
    with visattn.apply(model, PATTERN):
        swapped = model(x)
    hooked(model)
    with pytest.raises(ValueError, match=r"accelerate has put a hook in its place: call apply\(\) before its hooks"):
        visattn.apply(model, PATTERN)
    remove_hook_from_module(model, recurse=True)
    with visattn.apply(model, PATTERN, strict=True):
        assert torch.equal(model(x), swapped)


@torch.no_grad()
def test_offloaded_parameters_that_a_block_reads_itself():
    model, x = swin()
    with visattn.apply(model, PATTERN):
        swapped = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(
            ValueError, match="accelerate loads relative_position_bias_table of the attention of layers"
        ):
            model(x)
        remove_hook_from_module(model, recurse=True)
    with visattn.apply(model, PATTERN):
        blocks = {
            name: torch.device("cpu") for name, m in model.named_modules() if name.endswith(("blocks.0", "blocks.1"))
        }
        rest = [name for name, _ in model.named_children() if name != "layers"]
        where = blocks | dict.fromkeys(rest, torch.device("cpu"))
        attach_align_device_hook_on_blocks(model, execution_device=where, offload=dict.fromkeys(where, False))
        assert torch.equal(model(x), swapped)


@torch.no_grad()
def test_a_module_of_two_models_says_whose_it_is():
    model, other = make(), make()
    other.blocks[1].attn = model.blocks[1].attn
    with (
        visattn.apply(model, PATTERN),
        pytest.raises(
            ValueError,
            match=r"at blocks.1.attn: call remove\(\) on its handle .* of another model",
        ),
    ):
        visattn.apply(other, PATTERN)
    with visattn.apply(other, PATTERN) as handle:
        other(X)
        assert handle.report().sites_hit == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_has_no_copies(duplicate):
    model = make()
    handle = visattn.apply(model, PATTERN)
    with pytest.raises(
        ValueError, match="a handle belongs to the model that it patched and cannot be copied or pickled"
    ):
        duplicate({"model": model, "handle": handle} if duplicate is copy.deepcopy else handle)
    handle.remove()


@MODELS
@torch.no_grad()
def test_shapes_by_meta_tensors(build):
    model, x = build()
    visattn.apply(model, PATTERN)
    assert model.to("meta")(x.to("meta")).shape == (1, model.num_classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precise_steps": torch.ones(2)}, r"precise_steps=Tensor \[2\] must be a count of steps"),
        ({"layers": {"0": "na(window=5)"}}, "layers={'0': 'na.window=5.'} is a mapping: pass it as pattern="),
        ({"mesh": 3}, "mesh=3 says which processes share the tokens: pass parallel="),
    ],
)
def test_arguments_of_apply_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        visattn.apply(make(), PATTERN, **options)
