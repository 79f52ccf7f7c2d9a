"""Fewer query heads and shared key heads: exact where heads are alike, the authors' outputs, and the way back."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch

import visattn
from tests.golden.fill import fill, fill_value, make_input
from tests.support.tiny_flux import flux
from tests.support.tiny_images import sd15
from tests.support.tiny_videos import wan
from visattn.heads.linears import Shared, allocated, driven
from visattn.heads.mixing import head_norms
from visattn.heads.sites import find_sites

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "key_driven.pt", weights_only=True)
HEADS = 4


def vit(**more):
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": HEADS, "num_classes": 3}
    model = fill(timm.create_model("vit_tiny_patch16_224", **options | more))
    return model, {"x": make_input((2, 3, 32, 32), 1)}


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.sample


def alike(model, group, parts):
    """Make the named heads of each group of so many neighbours equal, in place."""
    for site in find_sites(model, None):
        for stream in site.streams:
            slots = [stream.q] if stream.k is None else [stream.q, stream.k, stream.v]
            for part, slot in zip("qkv", slots, strict=False):
                for value in slot.layer.parameters():
                    blocks = value.data.unflatten(0, (3 if stream.k is None else 1, site.heads // group, group, -1))
                    chosen = [i for i, name in enumerate("qkv") if name in parts] if stream.k is None else [0]
                    if stream.k is not None and part not in parts:
                        continue
                    for i in chosen:
                        blocks[i, :, 1:] = blocks[i, :, :1].clone()
            for slot in stream.norms:
                value = slot.layer.weight.data.unflatten(0, (site.heads // group, group, -1))
                value[:, 1:] = value[:, :1].clone()


MAKERS = {"vit": vit, "vit with norms": lambda: vit(qk_norm=True), "flux": flux, "wan": wan, "unet": sd15}


@pytest.mark.parametrize("name", MAKERS)
def test_heads_that_are_alike_merge_exactly(name):
    model, inputs = MAKERS[name]()
    alike(model, 2, "qkv")
    before, state = run(model, inputs), copy.deepcopy(model.state_dict())
    with visattn.convert_heads(model, 0.5) as converted:
        assert (run(model, inputs) - before).abs().max() < 2e-5 * before.abs().max()
        changed = [module for module in converted.modules if not module.why]
        assert changed and all(2 * module.heads[1] == module.heads[0] == 2 * module.kv_heads for module in changed)
        real = sum(p.numel() for p in model.parameters())
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
    saved = sum(m.parameters[0] - m.parameters[1] for m in converted.modules)
    assert saved == sum(p.numel() for p in model.parameters()) - real > 0
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("name", MAKERS)
def test_key_heads_that_are_alike_are_shared_exactly(name):
    model, inputs = MAKERS[name]()
    alike(model, 2, "kv")
    before = run(model, inputs)
    with visattn.convert_heads(model, kv_heads=0.5) as converted:
        assert (run(model, inputs) - before).abs().max() < 2e-5 * before.abs().max()
        assert all(m.heads == (2 * m.kv_heads,) * 2 and m.parameters[1] < m.parameters[0] for m in converted.modules)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['allocation']} {c['kv_heads']}")
def test_outputs_of_the_authors_code(case):
    module = timm.layers.attention.Attention(48, GOLDEN["heads"], qkv_bias=True).double()
    grow = torch.ones(144)
    grow[48:96] = torch.linspace(0.2, 2.5, 8).repeat_interleave(6)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = fill_value(f"blocks.0.attn.{name}", parameter.shape)
            wide = grow.view(-1, *[1] * (value.ndim - 1)) if name.startswith("qkv") else 1
            parameter.copy_(value * wide)
    # As a block of a model is.
    model = torch.nn.ModuleDict({"attn": module})
    visattn.convert_heads(model, kv_heads=case["kv_heads"], allocation=case["allocation"])
    out = model["attn"](make_input(GOLDEN["input_shape"], GOLDEN["input_seed"]).double())
    assert (out - case["output"]).abs().max() < 1e-5


def test_query_heads_are_given_out_as_the_authors_do():
    for rule in GOLDEN["rules"]:
        owner = allocated(driven(rule["norms"]), rule["heads"])
        assert torch.bincount(owner, minlength=len(rule["norms"])).tolist() == rule["counts"]
    assert allocated(driven(torch.ones(3)), 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert allocated(torch.tensor([0.0]), 4).tolist() == [0] * 4


def test_heads_that_weigh_nothing_are_left_out_exactly():
    model, inputs = vit()
    for block in model.blocks:
        block.attn.proj.weight.data.unflatten(1, (HEADS, -1))[:, [0, 2]] = 0
    before = run(model, inputs)
    with visattn.convert_heads(model, 2, by="norm"):
        assert (run(model, inputs) - before).abs().max() < 1e-5
    with visattn.convert_heads(model, 2, by={f"blocks.{i}.attn": [3, 1] for i in range(2)}):
        assert (run(model, inputs) - before).abs().max() < 1e-5
    with visattn.convert_heads(model, 2, by={f"blocks.{i}.attn": [0, 1] for i in range(2)}):
        assert (run(model, inputs) - before).abs().max() > 1e-3


def test_norms_of_heads_are_those_of_their_products():
    for make in (vit, flux):
        site = find_sites(make()[0], None)[0]
        parts = []
        for stream in site.streams:
            value = (stream.v or stream.q).layer.weight.double()[-site.heads * site.head_dim :]
            out = stream.out.layer.weight.double()[:, : site.heads * site.head_dim]
            heads = zip(out.split(site.head_dim, 1), value.split(site.head_dim), strict=True)
            parts.append(torch.stack([(o @ v).norm() for o, v in heads]))
        assert torch.allclose(head_norms(site), torch.stack(parts).norm(dim=0))


@pytest.mark.parametrize("allocation", ["even", "norms", "moving"])
@pytest.mark.parametrize("make", [vit, wan])
def test_patterns_run_on_converted_models_and_all_of_it_learns(make, allocation):
    model, inputs = make()
    visattn.convert_heads(model, kv_heads=0.5, allocation=allocation)
    stock = run(model, inputs)
    with visattn.apply(model, "na(window=-1)", always=True, backend="sdpa"):
        assert (run(model, inputs) - stock).abs().max() < 1e-4 * stock.abs().max()
    pattern = "na(window=3x3)" if make is vit else "na(window=3x3x3)"
    with visattn.apply(model, pattern, always=True, strict=True):
        model.train()
        out = model(**inputs)
        (out if isinstance(out, torch.Tensor) else out.sample).square().mean().backward()
    grads = [p.grad for module in model.modules() if isinstance(module, Shared) for p in module.parameters()]
    assert grads and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_moving_norms_are_those_of_training_and_rest_otherwise():
    model, inputs = vit()
    visattn.convert_heads(model, kv_heads=2, allocation="moving", layers=0)
    layer = model.blocks[0].attn.qkv
    model.eval()
    run(model, inputs)
    assert torch.equal(layer.norms, torch.zeros(2)) and layer._moved().tolist() == [0, 0, 1, 1]
    model.train()
    run(model, inputs)
    once = layer.norms.clone()
    run(model, inputs)
    assert (once > 0).all() and torch.allclose(layer.norms, 1.1 * once, rtol=1e-5)
    assert "blocks.0.attn.qkv.norms" in model.state_dict()
    # A checkpointed block is run again in the backward: nothing is counted there.
    model.set_grad_checkpointing(True)
    model(**inputs).sum().backward()
    assert torch.allclose(layer.norms, 1.11 * once, rtol=2e-4)


def test_its_report_counts_what_is_there():
    model, _ = vit()
    inner = sum(p.numel() for block in model.blocks for p in block.attn.parameters())
    converted = visattn.convert_heads(model, 2, 1, layers="1")
    assert len(converted.modules) == 1 and "blocks.1.attn: 4 query heads -> 2, key heads 4 -> 1" in str(converted)
    before, after = converted.modules[0].parameters
    assert 2 * before == inner and after == sum(p.numel() for p in model.blocks[1].attn.parameters())
    assert f"{before:,} -> {after:,}" in str(converted)
    converted.remove()
    converted.remove()
    assert type(model.blocks[1].attn.qkv) is torch.nn.Linear and model.blocks[1].attn.attn_dim == 32


def test_conversions_of_one_model_are_removed_from_the_last_on():
    model, inputs = vit()
    before, layers = run(model, inputs), dict(model.named_modules())
    first = visattn.convert_heads(model, 2)
    second = visattn.convert_heads(model, kv_heads=1)
    between = run(model, inputs)
    with pytest.raises(ValueError, match="was converted again since"):
        first.remove()
    assert run(model, inputs).equal(between)
    second.remove()
    first.remove()
    assert run(model, inputs).equal(before)
    assert all(layer is layers[path] for path, layer in model.named_modules())


def test_refusals_come_before_anything_changes():
    model, inputs = vit()
    before = run(model, inputs)
    wrong = {
        (None, None): "neither query_heads nor kv_heads",
        (3, None): "by='norm' to keep the ones",
        (5, None): r"query_heads=5 must be a whole number from 1 to the 4 heads of blocks.0.attn",
        (0.3, None): "query_heads=0.3 must be",
        (True, None): "query_heads=True must be",
        (math.inf, None): "query_heads=inf must be",
        (None, math.nan): "kv_heads=nan must be",
        (2, 4): "which must divide them",
        (4, 3): "or be given out by norms",
    }
    for heads, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            visattn.convert_heads(model, *heads)
    for options, message in (
        ({"by": "best"}, "by='best' must be one of mean, norm"),
        ({"by": {"blocks.0.attn": [0]}}, "must name 2 of its heads"),
        ({"by": {"blocks.0.attn": torch.tensor([1, 1])}}, "must name 2 of its heads"),
        ({"by": {"blocks.0.attn": [0, 1.5]}}, "must name 2 of its heads"),
        ({"by": {"blocks.0.attn": [0, "a"]}}, "must name 2 of its heads"),
        ({"by": {"blocks.0.attn": 2}}, "must name 2 of its heads"),
        ({"by": {"blocks.0.atn": [0, 1]}}, r"heads for 'blocks.0.atn', which is none of the modules: blocks.0.attn"),
        ({"by": None}, "by=None must be one of mean, norm, or heads"),
        ({"by": [0, 1]}, r"by=\[0, 1\] must be one of"),
        ({"allocation": "random"}, "allocation='random' must be one of"),
        ({"layers": "9"}, "selects nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            visattn.convert_heads(model, 2, **options)
    with pytest.raises(ValueError, match="of which query_heads says how many"):
        visattn.convert_heads(model, kv_heads=2, by={"blocks.0.attn": [0, 1]})
    with pytest.raises(ValueError, match="is no module: pass a model"):
        visattn.convert_heads("flux", 2)
    with pytest.raises(ValueError, match="has no attention module"):
        visattn.convert_heads(torch.nn.Linear(2, 2), 2)
    with visattn.apply(model, "na(window=3x3)"), pytest.raises(ValueError, match="the model is patched"):
        visattn.convert_heads(model, 2)
    transformer, _ = flux()
    with visattn.apply(transformer, "na(window=3x3)"), pytest.raises(ValueError, match="the model is patched"):
        visattn.convert_heads(transformer, 1)
    with pytest.raises(ValueError, match="other key heads"):
        visattn.convert_heads(transformer, kv_heads=1, allocation="norms", layers=0)
    assert torch.equal(run(model, inputs), before)
    rigid = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1).eval()
    with pytest.raises(ValueError, match=r"has no attention module|takes the channels of its heads"):
        visattn.convert_heads(rigid, 1)


@pytest.mark.parametrize("make", [flux, sd15])
def test_fused_projections_are_refused_and_unfused_ones_are_not(make):
    """What a fused model projects with is another layer, so that a conversion would change nothing."""
    model, inputs = make()
    before = run(model, inputs)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"are fused.*call unfuse_qkv_projections\(\) first"):
        visattn.convert_heads(model, kv_heads=1)
    model.unfuse_qkv_projections()
    with visattn.convert_heads(model, kv_heads=1):
        assert not torch.allclose(run(model, inputs), before)
    torch.testing.assert_close(run(model, inputs), before)


def test_a_model_that_got_another_dtype_keeps_it_when_all_is_undone():
    model, _ = flux()
    with visattn.convert_heads(model, 1):
        model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


DIFFUSERS = ("flux", "wan", "unet")


@pytest.mark.parametrize("name", DIFFUSERS)
def test_converted_projections_may_be_fused_and_come_back_in_any_order(name):
    model, inputs = MAKERS[name]()
    before = run(model, inputs)
    converted = visattn.convert_heads(model, 0.5)
    fewer = run(model, inputs)
    model.fuse_qkv_projections()
    assert torch.allclose(run(model, inputs), fewer, atol=1e-5)
    converted.remove()
    assert torch.allclose(run(model, inputs), before, atol=1e-5), "the fused layer is of the original ones again"
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), before)
    with visattn.convert_heads(model, 0.5):
        model.fuse_qkv_projections()
        model.unfuse_qkv_projections()
        assert torch.equal(run(model, inputs), fewer)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_projections_whose_key_heads_are_shared_are_not_fused(name):
    model, inputs = MAKERS[name]()
    before = run(model, inputs)
    with visattn.convert_heads(model, kv_heads=0.5):
        shared = run(model, inputs)
        for each in (model, copy.deepcopy(model)):
            with pytest.raises(ValueError, match="has key heads that query heads share, and a fused projection would"):
                each.fuse_qkv_projections()
        assert torch.equal(run(model, inputs), shared)
    model.fuse_qkv_projections()
    assert torch.allclose(run(model, inputs), before, atol=1e-5)


def test_blocks_of_derived_classes_have_the_heads_of_their_own():
    """FSDP2 derives a class for each block that it shards."""

    def counted(model):
        with visattn.convert_heads(model, 1):
            return sum(parameter.numel() for parameter in model.parameters())

    model, _ = flux()
    true = counted(model)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
    assert counted(model) == true
