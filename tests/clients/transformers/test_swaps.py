"""Towers of transformers whose attention calls no implementation: its classes are swapped while they are patched."""

import copy
import pickle
import warnings

import pytest

pytest.importorskip("transformers")

import torch

import visattn
from tests.clients.transformers.test_towers import hide, mask_of
from tests.support.tiny_towers import first, inputs, make
from visattn import Layout

PATTERN = "na(window=3)"


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("folder", ["sam", "hiera", "swinv2", "timesformer"])
@torch.no_grad()
def test_classes_come_back_and_copies_are_stock(folder):
    model, x = make(folder), inputs(folder)
    stock, before = first(model(**x)), kinds(model)
    handle = visattn.apply(model, PATTERN, backend="tiles", strict=True)
    assert kinds(model) != before and model.state_dict().keys() == make(folder).state_dict().keys()
    with pytest.raises(ValueError, match="is patched already"):
        visattn.apply(model, PATTERN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(other) == before and torch.equal(first(other(**x)), stock)
    assert not torch.equal(first(model(**x)), stock)
    handle.remove()
    handle.remove()
    assert kinds(model) == before and torch.equal(first(model(**x)), stock)


@torch.no_grad()
def test_dense_layers_are_counted_and_seen():
    model, x = make("sam"), inputs("sam")
    stock, seen = first(model(**x)), []
    with visattn.apply(model, {"0": "dense", "1": PATTERN}, backend="tiles") as handle:
        handle.watch(lambda watched: seen.append((watched.site, watched.out.abs().sum() > 0)))
        found = first(model(**x))
        report = handle.report()
    assert [(site.site, site.hits, site.dense) for site in report.sites] == [
        ("vision_encoder.layers.0.attn", 0, 1),
        ("vision_encoder.layers.2.attn", 1, 0),
    ]
    assert [site for site, _ in seen] == [site.site for site in report.sites] and all(some for _, some in seen)
    assert not torch.equal(found, stock)


def test_gradients_equal_those_of_masked_dense(monkeypatch):
    model, x = make("sam"), inputs("sam")
    layer, weight = model.vision_encoder.layers[0].attn, torch.randn(2, 16, 6, 6)

    def gradients():
        model.zero_grad()
        (first(model(**x)) * weight).sum().backward()
        return [layer.rel_pos_h.grad.clone(), layer.rel_pos_w.grad.clone(), layer.qkv.weight.grad.clone()]

    with visattn.apply(model, PATTERN, backend="tiles", strict=True):
        found = gradients()
    hide(monkeypatch, [mask_of(Layout((6, 6)))])
    for ours, theirs in zip(found, gradients(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_what_stays_dense_says_why():
    model, x = make("sam", attention_dropout=0.5).train(), inputs("sam")
    with pytest.warns(UserWarning, match=r"it has dropout 0\.5"), visattn.apply(model, PATTERN) as handle:
        model(**x)
        assert handle.report().hits == 0
    with visattn.apply(model.eval(), PATTERN, backend="tiles", strict=True):
        model(**x)
    hiera, pixels = make("hiera"), torch.randn(1, 3, 96, 160)
    with visattn.apply(hiera, PATTERN, backend="tiles", strict=True) as handle:
        hiera(pixels, interpolate_pos_encoding=True)
        report = handle.report()
    assert {call.problem.layout.grid for site in report.sites for call in site.calls} == {(6, 10), (3, 5)}
    joint = make("timesformer", attention_type="joint_space_time")
    with pytest.warns(UserWarning, match="frames alternate within each place"), visattn.apply(joint, PATTERN):
        joint(**inputs("timesformer"))
    with pytest.raises(ValueError, match="3 axes"):
        visattn.apply(hiera, "na(window=3x3x3)")


@torch.no_grad()
def test_windows_give_way_to_a_neighborhood_with_their_bias():
    model, whole, x = make("swinv2", window_size=3), make("swinv2"), inputs("swinv2")
    shifted = model.encoder.layers[0].blocks[0].attention.self
    assert shifted.window_size == (3, 3) and model.encoder.layers[1].blocks[1].shift_size == 1
    # The stock model's windows are no dense attention, so that what covers the map is not left to it.
    with visattn.apply(model, "na(window=99)", strict=True) as handle:
        found, report = first(model(**x)), handle.report()
    assert report.hits == 3 and report.sites[0].calls[0].backend != "stock"
    for ours, theirs in zip(model.modules(), whole.modules(), strict=True):
        if hasattr(ours, "relative_coords_table"):
            # The same biases by distance, in one window as large as the map.
            theirs.pretrained_window_size = ours.window_size
            table, index = theirs.create_coords_table_and_index()
            theirs.relative_coords_table, theirs.relative_position_index = table, index
    assert (found - first(whole(**x))).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="cannot carry the relative position bias of Swinv2Model: use na"):
        visattn.apply(model, "clear(radius=2)")
    with visattn.apply(model, "na(window=3)"), pytest.raises(ValueError, match="output_attentions=True"):
        model(**x, output_attentions=True)


@torch.no_grad()
def test_compiled_modules():
    model, seen = make("sam"), []
    attention = model.vision_encoder.layers[0].attn
    with visattn.apply(model, PATTERN, backend="tiles"):
        see = attention.register_forward_hook(lambda m, args, given, out: seen.extend([given, out]), with_kwargs=True)
        model(**inputs("sam"))
        see.remove()
        found = torch.compile(attention, backend="eager", fullgraph=True)(**seen[0])[0]
    assert (found - seen[1][0]).abs().max() <= 1e-5
    hiera = make("hiera")
    with visattn.apply(hiera, PATTERN):
        hiera(**inputs("hiera"))
        with pytest.raises(Exception, match="sorts its tokens by the pooling to come"):
            torch.compile(hiera.encoder.stages[3].layers[1].attn, backend="eager", fullgraph=True)(
                torch.randn(2, 9, 128)
            )


@pytest.mark.parametrize(
    "text",
    ["agent(agents=2)", "linear", "gated(of=na(window=3))", "selective(of=na(window=3))", "sla(keep=2, block=3)"],
)
def test_position_logits_need_products(text):
    with pytest.raises(ValueError, match="has no logits of pairs of tokens to which the position logits of SamVision"):
        visattn.apply(make("sam"), text)


@torch.no_grad()
def test_heads_with_patterns_of_their_own_carry_position_logits():
    model, given = make("sam"), inputs("sam")
    outs = []
    for text in (
        "na(window=3)",
        "perhead(heads={0: na(window=3), 1-: na(window=3)})",
        "best(of=[na(window=3), dense])",
    ):
        with visattn.apply(model, text, always=True):
            outs.append(first(model(**given)))
    assert torch.allclose(outs[0], outs[1], atol=1e-5) and outs[2].isfinite().all()


@pytest.mark.parametrize("folder", ["sam", "hiera", "swinv2", "timesformer"])
@torch.no_grad()
def test_hooks_of_accelerate(folder):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = make(folder), inputs(folder)
    stock = first(model(**x))
    handle = visattn.apply(model, PATTERN, backend="tiles")
    swapped = first(model(**x))
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    assert torch.equal(first(model(**x)), swapped)
    handle.remove()
    assert torch.equal(first(model(**x)), stock), "the hooks have kept the forward of the swapped class"
    with pytest.raises(ValueError, match=r"accelerate has put a hook in its place: call apply\(\) before its hooks"):
        visattn.apply(model, PATTERN)
    hooks.remove_hook_from_module(model, recurse=True)
    # What the hooks leave behind is the forward of the class.
    with visattn.apply(model, PATTERN, backend="tiles", strict=True):
        assert torch.equal(first(model(**x)), swapped)
    assert torch.equal(first(model(**x)), stock)


@torch.no_grad()
def test_offloaded_parameters_that_a_block_reads_itself():
    accelerate = pytest.importorskip("accelerate")
    model, x = make("swinv2"), inputs("swinv2")
    with visattn.apply(model, PATTERN, backend="tiles"):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(
            ValueError, match=r"accelerate loads logit_scale of the attention of encoder.layers.0.blocks.0"
        ):
            model(**x)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_breaks_in_compiled_code_are_told(strict):
    model, x = make("hiera"), inputs("hiera")
    visattn.apply(model, PATTERN, backend="tiles", strict=strict)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    said = (
        "torch.compile could not follow the whole of HieraModel, and between its parts encoder.stages.2.layers.1.attn"
    )
    with pytest.raises(ValueError, match=f"strict: {said}") if strict else pytest.warns(UserWarning, match=said):
        compiled(**x)
    # Without the compiler all is as ever.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**x)
