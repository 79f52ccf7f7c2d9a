"""Prompts for the small models that bring a text encoder of their own: checked, cut with a warning, encoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded prompts.

    Attributes:
        text: [B, tokens, width], zero where a prompt has no token.
        pooled: [B, width], the mean over the tokens that a prompt has.
    """

    text: torch.Tensor
    pooled: torch.Tensor

    def joined(self, other: Encoded) -> Encoded:
        """These prompts and then the others, as one batch."""
        return Encoded(torch.cat([self.text, other.text]), torch.cat([self.pooled, other.pooled]))


class PromptWarning(UserWarning):
    """A prompt is used, but not as it was written."""


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: If there is none, or one is no text or says nothing.
    """
    if not isinstance(prompt, str | Sequence):
        raise ValueError(f"prompt {prompt!r} is a {type(prompt).__name__}: pass a text or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list: pass a text or several")
    for each in prompts:
        if not isinstance(each, str):
            raise ValueError(f"prompt {each!r} is a {type(each).__name__}: pass a text or a list of texts")
        if not each.strip():
            raise ValueError(f"prompt {each!r} is empty: say what to draw, for example 'a red apple, 3d'")
    return prompts


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids [B, tokens] of prompts, all padded to the length that the model was trained with.

    Warns:
        PromptWarning: If a prompt is cut because it is too long, or has characters that the tokenizer does not know.

    Raises:
        ValueError: If nothing of a prompt is known.
    """
    length, unknown = tokenizer.model_max_length, tokenizer.unk_token_id
    for each in prompts:
        ids = tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
        strange = sorted({sign for sign in each if unknown in tokenizer(sign, add_special_tokens=False)["input_ids"]})
        if ids and all(i == unknown for i in ids):
            raise ValueError(f"prompt {each!r} has no character that this model knows: write it in English")
        if strange:
            _warn(f"prompt {each!r}: the model does not know {' '.join(strange)} and draws without")
        if len(ids) > length - 1:
            kept = tokenizer.decode(ids[: length - 1], skip_special_tokens=True)
            _warn(f"prompt has {len(ids)} tokens and the model reads {length - 1}: it is cut after {kept[-40:]!r}")
    rows = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)["input_ids"]
    return torch.tensor(rows)


def null_ids(tokenizer: Any, count: int) -> torch.Tensor:
    """Token ids [count, tokens] of the null prompt of classifier-free guidance, which says nothing."""
    rows = tokenizer([""] * count, padding="max_length", max_length=tokenizer.model_max_length)["input_ids"]
    return torch.tensor(rows)


def encode_tokens(text_encoder: torch.nn.Module, ids: torch.Tensor, pad: int) -> Encoded:
    """Runs the text encoder.

    Args:
        text_encoder: A T5 encoder.
        ids: [B, tokens].
        pad: Id of the padding token, which other tokens do not see.
    """
    mask = ids != pad
    text = text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    return Encoded(text, text.sum(1) / mask.sum(1, keepdim=True))


def _warn(text: str) -> None:
    warnings.warn(text, PromptWarning, stacklevel=4)
