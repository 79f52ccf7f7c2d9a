"""What guide() reads of a pipeline: how often and where the prediction with the prompt counts in its sum."""

from types import SimpleNamespace

import pytest
import torch

from visattn.pipelines.guidance import sums

CFG, TWO = {"do_classifier_free_guidance": True, "guidance_scale": 4.0}, torch.zeros(2)
# Class of a pipeline, what it holds, samples of the call, its context, and the factor and half of the sum.
READ = {
    "stacked": ("X", CFG, 4, None, (4.0, slice(2, None))),
    "stacked, named": ("X", CFG, 4, "cond_uncond", (4.0, slice(2, None))),
    "prompt first": ("ZImagePipeline", CFG, 4, None, (5.0, slice(2))),
    "prompt first, Lumina-Next": ("LuminaPipeline", CFG, 4, None, (4.0, slice(2))),
    "truncated": ("ZImagePipeline", {**CFG, "current_guidance_scale": 0.0}, 2, None, (1.0, slice(None))),
    "truncated, flag": ("X", {**CFG, "do_classifier_free_truncation": True}, 2, None, (1.0, slice(None))),
    "from the prompt": ("Cosmos2TextToImagePipeline", {**CFG, "prompt_embeds": TWO}, 2, None, (5.0, slice(None))),
    "off": ("X", {"do_classifier_free_guidance": False, "guidance_scale": 4.0}, 2, None, (1.0, slice(None))),
    "distilled": ("X", {"guidance_scale": 4.0}, 2, None, (1.0, slice(None))),
    "no flag": ("X", {"guidance_scale": 4.0, "negative": "x", "prompt_embeds": TWO}, 2, None, (4.0, slice(None))),
    "no flag, stacked": ("DiTPipeline", {"guidance_scale": 4.0, "uncond": 1}, 4, None, (4.0, slice(2))),
    "negative": ("X", {"guidance_scale": 4.0, "negative_embeds": {"a": TWO}}, 2, None, None),
    "other context": ("X", CFG, 2, "uncond_stg", None),
    "both": ("X", {**CFG, "prompt_embeds": TWO, "negative_embeds": TWO}, 2, None, "does not tell which"),
    "neither": ("X", CFG, 2, None, "does not tell which"),
    "three": ("X", {**CFG, "image_guidance_scale": 1.5}, 6, None, "three predictions"),
    "later": ("X", {**CFG, "use_dynamic_cfg": True}, 4, None, "sets its scale after"),
    "no scale": ("X", {"do_cfg": True}, 4, None, "does not tell its guidance_scale"),
}


def of(kind, module="diffusers.pipelines.x", bases=()):
    """A pipeline of a class of that name; "X" stands for one of diffusers' that is like most."""
    return type("XPipeline" if kind == "X" else kind, bases, {"__module__": module})()


@pytest.mark.parametrize("name", READ)
def test_read_sum(name, monkeypatch):
    kind, names, batch, context, expected = READ[name]
    frame = SimpleNamespace(f_locals={"latents": TWO, **names})
    monkeypatch.setattr(sums, "running_pipeline", lambda model: (of(kind), frame))
    given = {"hidden_states": torch.zeros(batch), "text": TWO}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            sums.read_sum(torch.nn.Module(), given, batch, context)
    else:
        assert sums.read_sum(torch.nn.Module(), given, batch, context) == expected


def test_guider_is_refused(monkeypatch):
    pipeline = type("HunyuanImagePipeline", (), {"guider": object()})()
    monkeypatch.setattr(sums, "running_pipeline", lambda model: (pipeline, SimpleNamespace(f_locals={})))
    with pytest.raises(ValueError, match="guider's"):
        sums.read_sum(torch.nn.Module(), {}, 1, "pred_cond")


@pytest.mark.parametrize("first", [True, False])
def test_stacks_of_pipelines_that_nobody_read(first, monkeypatch):
    """Which half has the prompt is seen from what is stacked; where that does not tell, classes that were read do."""
    with_, without = torch.ones(2, 3), torch.zeros(2, 3)
    names = {**CFG, "latents": TWO, "prompt_embeds": with_, "negative_prompt_embeds": without}
    # Nothing that could be compared with what is stacked.
    names |= {"prompt_mask": torch.ones(2, 3, dtype=torch.int64), "prompt_ids": torch.ones(2, 3, device="meta")}
    given = {"text": torch.cat([with_, without] if first else [without, with_])}

    def read(names, base=()):
        pipeline = of("OwnPipeline", "somewhere", base)
        monkeypatch.setattr(sums, "running_pipeline", lambda model: (pipeline, SimpleNamespace(f_locals=names)))
        return sums.read_sum(torch.nn.Module(), given, 4, None)

    assert read(names) == (4.0, slice(2) if first else slice(2, None))
    for unclear in ({"negative_prompt_embeds": with_}, {"prompt_embeds": None, "negative_prompt_embeds": None}):
        with pytest.raises(ValueError, match="does not tell which"):
            read(names | unclear)
    # What is stacked says more than a name.
    assert read(names, (type(of("ZImagePipeline")),)) == (5.0, slice(2) if first else slice(2, None))
    # One that is made from a class that was read stacks as that one does.
    assert read({**CFG, "latents": TWO}, (type(of("ZImagePipeline")),)) == (5.0, slice(2))
