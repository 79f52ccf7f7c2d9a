"""Captions of the emoji pictures, their tokens, and which pictures training never sees."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from scripts.train.emoji_sources import Emoji
from visattn.pipelines.embedded import EMBEDDED

TOKENS = 32
VOCABULARY = 4096
VARIANTS = 12
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TRAIN, NEW_PAIR, NEW_EMOJI = "train", "new pair", "new emoji"
SPLITS = (TRAIN, NEW_PAIR, NEW_EMOJI)
HELD_OUT = 0.05


def split_of(emoji: Emoji, style: str) -> str:
    """TRAIN, NEW_PAIR (training sees the emoji, but not in this style) or NEW_EMOJI (it never sees it).

    It depends on nothing but the names, so that other packs and other machines agree; skin tones go with their emoji.
    """
    return split_of_base(emoji.base, style)


def split_of_base(base: str, style: str) -> str:
    """`split_of` the emoji that have these code points without their skin tone."""
    if _share(f"emoji {base}") < HELD_OUT:
        return NEW_EMOJI
    return NEW_PAIR if _share(f"pair {base} {style}") < HELD_OUT else TRAIN


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def caption(emoji: Emoji, style: str) -> str:
    """The caption that measurements use."""
    return f"{emoji.name}, {style}"


def captions(emoji: Emoji, style: str, count: int = VARIANTS) -> list[str]:
    """Captions to train on: half are `caption`, the rest other ways to say it; the same in every run."""
    chance = random.Random(f"{emoji.code} {style}")
    own = [tag for tag in emoji.tags if tag != emoji.name]
    plain = caption(emoji, style)
    others = []
    while len(others) < count - count // 2:
        tags = chance.sample(own, min(len(own), chance.randint(1, 3)))
        others.append(
            chance.choice(
                (
                    f"{_article(emoji.name)} {emoji.name}, {style}",
                    f"{_article(emoji.name)} {emoji.name}, {style}",
                    f"{style} {emoji.name}",
                    f"{style} emoji of {_article(emoji.name)} {emoji.name}",
                    ", ".join((emoji.name, *tags, style)),
                    ", ".join((*tags, emoji.name, style)),
                    ", ".join((*tags, style)) if len(tags) > 1 and not emoji.tone else plain,
                    emoji.name if style == "3d" else plain,
                )
            )
        )
    return [plain] * (count // 2) + others


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-pair tokens of small letters, trained on the captions, in transformers' form."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=[chr(code) for code in range(33, 127) if not chr(code).isupper()],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=TOKENS
    )


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The emoji model's tokenizer, which the judge in scripts/measure and the animoji model read with too."""
    folder = EMBEDDED["emoji"].folder / "tokenizer"
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that give each piece the same number, nearly surely."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Rows of TOKENS token ids, padded and cut."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    return tokenizer(list(texts), **options)["input_ids"]
