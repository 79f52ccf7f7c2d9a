"""Copies, pickles, changed classes and undo of swapped timm models."""

import copy
import io
import pickle
import pickletools

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import visattn
from tests.models.test_swap import SWINS, make_swin
from visattn import Layout

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 64}
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make(**kwargs):
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def is_stock(model, like):
    """Whether nothing of a patch is left: classes, hooks and attributes are those of a model never patched."""
    pairs = list(zip(model.modules(), like.modules(), strict=True))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m, _ in pairs]
    return all(type(a) is type(b) and a.__dict__.keys() == b.__dict__.keys() for a, b in pairs) and not any(hooks)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved])
@torch.no_grad()
def test_copies_are_stock(duplicate):
    model, like = make(), make()
    stock = model(X)
    handle = visattn.apply(model, "na(window=3)", strict=True)
    swapped = model(X)
    copied = duplicate(model)
    part = duplicate(model.blocks[1].attn)
    assert type(part) is type(like.blocks[1].attn)
    if duplicate is not copy.copy:  # which shares the parts
        assert is_stock(copied, like) and torch.equal(copied(X), stock)
        with visattn.apply(copied, "na(window=3)"):
            assert torch.equal(copied(X), swapped)
    assert torch.equal(model(X), swapped) and not torch.equal(swapped, stock)
    handle.remove()
    assert is_stock(model, like) and torch.equal(model(X), stock)


def test_a_saved_model_needs_no_visattn():
    model = make()
    with visattn.apply(model, "na(window=3)", strict=True):
        texts = {argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)}
    assert "timm.layers.attention" in texts
    assert not [text for text in texts if "visattn" in text or "Swapped" in text]


@torch.no_grad()
def test_copies_of_blocks_on_maps_are_stock():
    name = "swin_tiny_patch4_window7_224"
    model, like = make_swin(name), make_swin(name)
    x = torch.randn(1, 3, *[SWINS[name]["img_size"]] * 2)
    stock = model(x)
    visattn.apply(model, "na(window=3)")
    assert is_stock(copy.deepcopy(model), like) and torch.equal(pickled(model)(x), stock)


def parametrized(module):
    module.register_parameter("gain", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(module, "gain", nn.Softplus())


def derived(module):
    """What FSDP2 does to the class."""
    module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})


@pytest.mark.parametrize("change", [parametrized, derived])
@torch.no_grad()
def test_undo_after_the_class_was_changed(change):
    model = make()
    stock = model(X)
    handle = visattn.apply(model, "na(window=3)")
    swapped = model(X)
    change(model.blocks[0].attn)
    assert torch.equal(model(X), swapped)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), stock)
    handle.remove()
    handle.remove()
    assert torch.equal(model(X), stock)
    with visattn.apply(model, "na(window=3)") as handle:
        assert torch.equal(model(X), swapped) and handle.report().sites_hit == 2
    assert torch.equal(model(X), stock)
    if change is parametrized:
        parametrize.remove_parametrizations(model.blocks[0].attn, "gain")
        assert torch.equal(model(X), stock)


class Logged(timm.layers.Attention):
    """Adds something beside the attention."""

    def extra_repr(self):
        return "logged"


class Own(timm.layers.Attention):
    """Has an attention of its own."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask=attn_mask, is_causal=is_causal)


class Foreign(nn.Module):
    """Nothing that anybody knows."""

    def forward(self, x, **kwargs):
        return x.flip(1)


@torch.no_grad()
def test_subclasses_follow_their_base():
    model = make()
    model.blocks[1].attn.__class__ = Logged
    with visattn.apply(model, "na(window=3)") as handle:
        model(X)
        assert handle.report().sites_hit == 2
        assert isinstance(model.blocks[1].attn, Logged)
    assert type(model.blocks[1].attn) is Logged
    whole = make(attn_layer=Logged)
    with visattn.apply(whole, "na(window=3)", strict=True) as handle:
        whole(X)
        assert handle.report().sites_hit == 2


def own(attention):
    attention.__class__ = Own


def monkeypatched(attention):
    attention.forward = lambda x, **kwargs: x


REASONS = {own: "Own has a forward of its own", monkeypatched: "forward of the module itself was replaced"}


@pytest.mark.parametrize("change", REASONS)
@torch.no_grad()
def test_attention_of_its_own_is_dense_and_named(change):
    model = make(depth=3)
    change(model.blocks[1].attn)
    stock = model(X)
    with visattn.apply(model, "na(window=3)", strict=True) as handle:
        assert not torch.equal(model(X), stock)
        report = handle.report()
        assert len(report.modules) == 3 and report.sites_hit == 2
        assert report.sites[1].site == "blocks.1.attn" and report.sites[1].fallbacks == {REASONS[change]: 1}
        assert REASONS[change] in " ".join(str(report).split())
    with visattn.apply(model, {"0": "na(window=3)", "1-": "dense"}) as handle:
        model(X)
        assert handle.report().fallbacks == {}
    for block in model.blocks:
        change(block.attn)
    with pytest.raises(ValueError, match=f"no attention module that visattn can swap: {REASONS[change]}"):
        visattn.apply(model, "na(window=3)")


@torch.no_grad()
def test_attention_that_nobody_knows_is_named():
    model = make(depth=3)
    model.blocks[2].attn = Foreign()
    with visattn.apply(model, "na(window=3)") as handle:
        model(X)
        assert handle.report().fallbacks == {"Foreign is no attention that visattn knows": 1}
    model.blocks[2].attn = nn.Identity()
    with visattn.apply(model, "na(window=3)") as handle:
        assert len(handle.report().modules) == 2


@torch.no_grad()
def test_a_block_around_attention_of_its_own():
    model = make_swin("swin_tiny_patch4_window7_224")
    attention = model.layers[0].blocks[0].attn
    attention.__class__ = type("Mine", (type(attention),), {"forward": lambda self, x, mask=None: x})
    with visattn.apply(model, "na(window=3)") as handle:
        model(torch.randn(1, 3, 112, 112))
        assert handle.report().fallbacks == {"its attn has a forward of its own": 1}


def test_a_handle_that_was_removed_undoes_no_later_one():
    model = make()
    with torch.no_grad():
        stock = model(X)
        with visattn.apply(model, "na(window=3)") as first:
            first.remove()
            second = visattn.apply(model, "clear(radius=2)")
            sparse = model(X)
        assert not sparse.equal(stock) and model(X).equal(sparse)
        second.remove()
        assert model(X).equal(stock)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "features"])
@pytest.mark.parametrize("where", ["patch_embed", "blocks.0.norm1", "blocks.1"])
@torch.no_grad()
def test_the_grid_of_a_forward_that_raised_serves_no_other_tokens(where, whole):
    model = make(img_size=96, dynamic_img_size=True)
    tokens = torch.randn(1, 13, 48)
    stock = model.blocks[0](tokens)
    visattn.apply(model, "na(window=3)")
    run = model if whole else model.forward_features
    broken = model.get_submodule(where).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(torch.randn(1, 3, 32, 96))
    broken.remove()
    # The tokens are of no image that the model has embedded: 12 patches are also 3x4, and 6x2.
    assert torch.equal(model.blocks[0](tokens), stock)
    run(torch.randn(1, 3, 96, 32))
    broken = model.get_submodule(where).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(torch.randn(1, 3, 32, 96))
    broken.remove()
    assert torch.equal(model.blocks[0](tokens), stock)


@torch.no_grad()
def test_a_module_called_outside_of_a_forward_is_stock_unless_the_user_says_where_its_tokens_sit():
    model, other = (make(img_size=96, dynamic_img_size=True) for _ in range(2))
    other.load_state_dict(model.state_dict())
    tokens = torch.randn(1, 13, 48)
    stock, wide = model.blocks[0](tokens), other(torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)))
    handle = visattn.apply(model, "na(window=3)")
    model(torch.randn(1, 3, 32, 96))
    assert torch.equal(model.blocks[0](tokens), stock)
    why = "it was called outside of a forward of the model, and nothing tells the grid of its tokens"
    assert any(why in reason for reason in handle.report().sites[0].fallbacks)
    # A module that another model has too: its grid is not that of this one.
    other.blocks[0].attn = model.blocks[0].attn
    assert torch.equal(other(torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))), wide)
    handle.remove()
    with visattn.apply(model, "na(window=3)", layout=Layout((3, 4), prefix=1)):
        assert not torch.equal(model.blocks[0](tokens), stock)


@torch.no_grad()
def test_what_compiled_code_leaves_to_the_interpreter_has_its_grid():
    model = make(img_size=96, dynamic_img_size=True)
    visattn.apply(model, "na(window=3)", strict=True)
    wide, high = torch.randn(1, 3, 32, 96), torch.randn(1, 3, 96, 32)
    model(wide)
    expected = model(high)
    torch._dynamo.reset()
    model.blocks[0].attn.forward = torch._dynamo.disable(model.blocks[0].attn.forward)
    model(wide)
    assert torch.allclose(torch.compile(model, backend="eager")(high), expected, atol=1e-5)
