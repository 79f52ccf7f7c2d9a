"""What `visattn.apply` promises on models of transformers: masks, copies, gradients, compiled code, refusals."""

import copy
import pickle

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, ViTForImageClassification, ViTMAEConfig, ViTMAEModel
from transformers.models.vit import ViTConfig

import visattn
from tests.support.tiny_towers import IMAGE, first, inputs, make
from visattn import Layout

SPARSE = {"pattern": "na(window=3)", "backend": "tiles"}


def classifier():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**IMAGE, num_labels=5)).eval()


@torch.no_grad()
def test_padding_of_siglip2_is_not_lost():
    """Without masks of its own name, transformers would pass none and the padding would be seen."""
    model = make("siglip2")
    x = inputs("siglip2")
    x["spatial_shapes"] = torch.tensor([[6, 6], [4, 5]])
    x["pixel_attention_mask"][1, 20:] = 0
    stock = model(**x).last_hidden_state
    with visattn.apply(model, "na(window=99)", backend="reference") as handle:
        found = model(**x).last_hidden_state
        layouts = {call.problem.layout for site in handle.report().sites for call in site.calls}
    assert layouts == {Layout((6, 6)), Layout((4, 5), suffix=16)}
    assert torch.allclose(found[0], stock[0], atol=1e-4) and torch.allclose(found[1, :20], stock[1, :20], atol=1e-4)
    alone = {"pixel_values": x["pixel_values"][1:, :20], "spatial_shapes": torch.tensor([[4, 5]])}
    alone["pixel_attention_mask"] = torch.ones(1, 20)
    with visattn.apply(model, **SPARSE):
        both, one = model(**x).last_hidden_state, model(**alone).last_hidden_state
    assert (both[1, :20] - one[0]).abs().max() <= 1e-4 * one.std()


@torch.no_grad()
def test_text_towers_stay_as_they_are():
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=8)).eval()
    words = {"input_ids": torch.tensor([[1, 5, 9, 98, 98]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    x = {**words, "pixel_values": torch.randn(1, 3, 48, 48)}
    stock = model(**x)
    with visattn.apply(model, **SPARSE, strict=True) as handle:
        found = model(**x)
        assert all("vision" in site.site for site in handle.report().sites)
        assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(found.text_embeds, stock.text_embeds)
    assert not torch.allclose(found.image_embeds, stock.image_embeds, atol=1e-6)
    assert torch.equal(model(**x).image_embeds, stock.image_embeds)


@torch.no_grad()
def test_images_of_any_size_and_layers():
    model, wide = classifier(), torch.randn(1, 3, 40, 64)
    with visattn.apply(model, {"0": "dense", "1": "na(window=3)"}, backend="tiles") as handle:
        model(wide, interpolate_pos_encoding=True)
        model(torch.randn(1, 3, 48, 48))
        first_site, second = handle.report().sites
    assert first_site.hits == 0 and first_site.dense == 2
    assert [call.problem.layout for call in second.calls] == [Layout((5, 8), 1), Layout((6, 6), 1)]
    with pytest.raises(ValueError, match="selects nothing"):
        visattn.apply(model, "na(window=3)", layers="7")


@torch.no_grad()
def test_copies_and_saved_models_are_stock(tmp_path):
    model, x = classifier(), torch.randn(1, 3, 48, 48)
    stock, keys = model(x).logits, list(model.state_dict())
    handle = visattn.apply(model, **SPARSE)
    sparse = model(x).logits
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert "visattn" not in (tmp_path / "config.json").read_text()
    # Weights that were read lie at other addresses, where products may be rounded otherwise.
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(x).logits, stock, rtol=0, atol=1e-6)
    for other in (copied, pickled):
        assert torch.equal(other(x).logits, stock)
        with visattn.apply(other, **SPARSE):
            assert torch.equal(other(x).logits, sparse)
        assert torch.equal(other(x).logits, stock)
    handle.remove()
    handle.remove()
    assert torch.equal(copied(x).logits, stock) and torch.equal(model(x).logits, stock)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_of_blocks(reentrant):
    model = classifier().train()
    small, wide = torch.randn(2, 3, 48, 48), torch.randn(2, 3, 32, 72)  # as many tokens on another grid

    def gradients():
        model.zero_grad()
        losses = [model(x, interpolate_pos_encoding=True).logits.square().sum() for x in (small, wide)]
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    with visattn.apply(model, **SPARSE) as handle:
        wanted = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
        assert {call.problem.layout.grid for s in handle.report().sites for call in s.calls} == {(6, 6), (4, 9)}
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("folder", ["vit", "segformer"])
def test_compiled_models_run_their_patterns_without_breaks(folder):
    torch._dynamo.reset()
    model, x = make(folder), inputs(folder)
    stock = first(model(**x))
    with visattn.apply(model, **SPARSE):
        wanted = first(model(**x))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = first(compiled(**x))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()
    assert torch.equal(first(model(**x)), stock)
    assert (first(compiled(**x)) - stock).abs().max() <= 1e-4 * stock.std()


@pytest.mark.parametrize("folder", ["qwen2_5_vl", "hiera"])
def test_an_evaluation_in_inference_mode_does_not_hinder_training(folder):
    """These towers sort their tokens, and what says how is kept."""
    visattn.clear_caches()
    model, x = make(folder), inputs(folder)
    with visattn.apply(model, "na(window=3x3)") as handle:
        with torch.inference_mode():
            model(**x)
        first(model(**x)).square().mean().backward()
        assert handle.report().hits


@torch.no_grad()
def test_compiled_code_does_not_guess_what_a_mask_hides():
    torch._dynamo.reset()
    model, x = make("idefics3", num_hidden_layers=1), inputs("idefics3")
    x["patch_attention_mask"][1, :, 5:] = False
    with visattn.apply(model, **SPARSE), pytest.raises(Exception, match="does not see whether it only hides padding"):
        torch.compile(model, backend="eager", fullgraph=True)(**x)


def test_under_eager_attention_stock_is_eager():
    model, x = make("vit", attn_implementation="eager"), inputs("vit")
    with torch.no_grad():
        stock = first(model(**x))
        with visattn.apply(model, "dense"):
            assert torch.equal(first(model(**x)), stock)
        assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_module_called_alone_after_a_forward_that_raised_is_stock():
    model = classifier()
    with visattn.apply(model, **SPARSE) as handle:
        paths = [site.site for site in handle.report().sites]
    module, last = model.get_submodule(paths[0]), model.get_submodule(paths[-1])
    tokens = torch.randn(1, (model.config.image_size // model.config.patch_size) ** 2 + 1, model.config.hidden_size)
    stock = first(module(tokens))
    with visattn.apply(model, **SPARSE, strict=True):
        model(**inputs("vit"))
        broken = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs("vit"))
        broken.remove()
        assert torch.equal(first(module(tokens)), stock)
        copied = copy.deepcopy(model)
    assert not any(each._forward_hooks_always_called for each in copied.modules())


@torch.no_grad()
def test_an_implementation_that_was_set_since_computes_the_dense_calls_and_stays():
    model, twin, x = make("vit"), make("vit"), inputs("vit")
    handle = visattn.apply(model, {"0": "dense", "1": "na(window=3)"}, strict=True)
    sparse = first(model(**x))
    twin.set_attn_implementation("eager")
    with visattn.apply(twin, {"0": "dense", "1": "na(window=3)"}):
        expected = first(twin(**x))
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="'eager' was set after apply.*the pattern is installed again"):
        found = first(model(**x))
    assert torch.equal(found, expected) and not torch.equal(found, sparse)
    assert (handle.report().hits, handle.report().dense) == (2, 2)
    handle.remove()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(first(model(**x)), first(twin(**x)))


def test_an_implementation_that_was_set_before_remove_stays():
    model = classifier()
    handle = visattn.apply(model, **SPARSE)
    model.set_attn_implementation("eager")
    handle.remove()
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_compiled_code_refuses_an_implementation_that_was_set_since():
    torch._dynamo.reset()
    model, x = make("vit", num_hidden_layers=1), inputs("vit")
    with visattn.apply(model, **SPARSE):
        sparse = first(model(**x))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        model.set_attn_implementation("eager")
        with pytest.raises(Exception, match="an attention implementation was set after apply"):
            compiled(**x)
        with pytest.warns(UserWarning, match="installed again"):
            model(**x)
        torch.testing.assert_close(first(compiled(**x)), sparse, rtol=1e-4, atol=1e-5)


def test_attention_weights_are_refused():
    model = classifier()
    with visattn.apply(model, **SPARSE), pytest.raises(ValueError, match=r"output_attentions=True needs all"):
        model(torch.randn(1, 3, 48, 48), output_attentions=True)


def test_what_cannot_be_patched_says_so():
    model = classifier()
    with visattn.apply(model, **SPARSE), pytest.raises(ValueError, match="is patched already"):
        visattn.apply(model, **SPARSE)
    with pytest.raises(ValueError, match="dense_steps counts denoising steps"):
        visattn.apply(model, "na(window=3)", dense_steps=2)
    with pytest.raises(ValueError, match="3 axes but the tokens of ViTForImageClassification"):
        visattn.apply(model, "na(window=3x3x3)")
    with pytest.raises(ValueError, match="no pattern can run in ViTMAEEmbeddings: it drops tokens at random"):
        visattn.apply(ViTMAEModel(ViTMAEConfig(**IMAGE)), "na(window=3)")
    sizes = {"hidden_sizes": [8], "num_attention_heads": [1], "depths": [1], "sr_ratios": [1], "image_size": 32}
    pvt = transformers.PvtV2Model(transformers.PvtV2Config(**sizes, num_encoder_blocks=1, patch_sizes=[4], strides=[4]))
    with pytest.raises(ValueError, match=r"PvtV2Model has no vision tower that a pattern can run in .pvt_v2: its"):
        visattn.apply(pvt, "na(window=3)")
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match=r"BertModel \(bert\) has no vision tower that visattn knows"):
        visattn.apply(bert, "na(window=3)")


def test_dropped_tokens_of_a_video_are_no_grid():
    model, x = make("videomae"), inputs("videomae")
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[:, ::2] = True
    with visattn.apply(model, **SPARSE, strict=True), pytest.raises(ValueError, match="bool_masked_pos drops tokens"):
        model(**x, bool_masked_pos=mask)


def test_a_learnable_pattern_and_the_watcher():
    model, seen = classifier(), []
    with visattn.apply(model, "sigmoid()") as handle:
        handle.watch(lambda watched: seen.append(watched.site))
        model(torch.randn(1, 3, 48, 48)).logits.sum().backward()
        assert len(seen) == 2 and list(handle.parameters.parameters())
        assert all(p.grad is not None for p in handle.parameters.parameters())


@torch.no_grad()
def test_a_handle_that_was_removed_undoes_no_later_one():
    model, x = classifier(), torch.randn(1, 3, 48, 48)
    stock = model(x).logits
    first = visattn.apply(model, **SPARSE)
    first.remove()
    with visattn.apply(model, **SPARSE):
        sparse = model(x).logits
        first.remove()
        assert not sparse.equal(stock) and model(x).logits.equal(sparse)
    assert model(x).logits.equal(stock)
