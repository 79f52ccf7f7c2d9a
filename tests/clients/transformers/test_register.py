"""`visattn.register`: patterns by name of an attention implementation."""

import warnings

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModel, CLIPConfig, CLIPModel

import visattn
from tests.support.tiny_towers import IMAGE, first, inputs, make

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}


@torch.no_grad()
@pytest.mark.parametrize("folder", ["vit", "dinov3_vit", "yolos", "videomae"])
def test_a_name_runs_what_apply_runs(folder):
    model, x = make(folder), inputs(folder)
    stock = first(model(**x))
    with visattn.apply(model, "na(window=3)", backend="tiles"):
        wanted = first(model(**x))
    name = visattn.register("na(window=3)", backend="tiles")
    assert name == visattn.register(visattn.parse("na(window=3)"), backend="tiles") == "visattn:na(window=3) on tiles"
    model.set_attn_implementation(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first(model(**x)), wanted)
    model.set_attn_implementation("sdpa")
    assert torch.equal(first(model(**x)), stock)


@torch.no_grad()
def test_models_load_with_a_name_and_their_text_towers_stay(tmp_path):
    torch.manual_seed(0)
    saved = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8)).eval()
    saved.save_pretrained(tmp_path)
    words = {"input_ids": torch.tensor([[1, 5, 9, 98, 98]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    x = {**words, "pixel_values": torch.randn(1, 3, 48, 48)}
    wanted = saved(**x)
    name = visattn.register("na(window=3x3)", backend="tiles")
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model(**x)
    # Weights that were read lie at other addresses, where products may be rounded otherwise.
    torch.testing.assert_close(found.text_embeds, wanted.text_embeds, rtol=0, atol=1e-6)
    with visattn.apply(saved, "na(window=3x3)", backend="tiles"):
        torch.testing.assert_close(found.image_embeds, saved(**x).image_embeds, rtol=0, atol=1e-6)
    assert not torch.allclose(found.image_embeds, wanted.image_embeds, rtol=0, atol=1e-4)
    only = AutoModel.from_pretrained(tmp_path, attn_implementation={"vision_config": name})
    assert only.config.text_config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_name_says_once_what_it_cannot_run():
    model = make("vit")
    model.set_attn_implementation(visattn.register("na(window=5)", backend="tiles"))
    wide = torch.randn(1, 3, 40, 64)
    with pytest.warns(UserWarning, match=r"ViTAttention ran dense attention .* 41 tokens are no image of the size"):
        dense = first(model(wide, interpolate_pos_encoding=True))
    model.set_attn_implementation("sdpa")
    assert torch.equal(dense, first(model(wide, interpolate_pos_encoding=True)))
    packed = make("qwen2_vl")
    packed.set_attn_implementation(visattn.register("na(window=5)", backend="tiles"))
    with pytest.warns(UserWarning, match="does not tell where its tokens sit: use visattn.apply"):
        first(packed(**inputs("qwen2_vl")))


@torch.no_grad()
def test_padding_is_hidden_under_a_name_too():
    """A name that transformers' table of masks does not know gets no masks at all."""
    model, x = make("idefics3"), inputs("idefics3")
    x["patch_attention_mask"][1, :, 5:] = False
    with visattn.apply(model, "na(window=3)", backend="tiles"):
        wanted = first(model(**x))
    model.set_attn_implementation(visattn.register("na(window=3)", backend="tiles"))
    assert torch.equal(first(model(**x)), wanted)
    x["patch_attention_mask"][:] = True
    assert not torch.equal(first(model(**x)), wanted)


def test_what_no_name_can_tell():
    with pytest.raises(ValueError, match=r"sigmoid.* has parameters that nobody would keep: use visattn.apply"):
        visattn.register("sigmoid()")
    with pytest.raises(ValueError, match=r"unknown backend .nothing."):
        visattn.register("na(window=3)", backend="nothing")
