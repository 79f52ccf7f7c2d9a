"""Draws the picture of docs/transformers.md: a ViT of transformers that reads digits, and what a token of it reads.

Its weights are learnt here, in about a minute on two cores: 48 x 48 pixels, 12 x 12 tokens and a class token.

python -m scripts.tower_pictures [--steps 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import visattn
from scripts.results import ROOT
from scripts.train.digits_data import jitter, real_digits, upscale
from visattn import maps
from visattn.canvas import Picture, column, row, text
from visattn.files import written_whole
from visattn.maps.heat import enlarged, picture, plane, rooted, signed
from visattn.recorded import Recorded

SIDE, PATCH, BATCH = 48, 4, 32
TRAINED = 1200
PATTERNS = ("na(window=7x7)", "na(window=5x5)")
SHOWN = 120


def trained(steps: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, and digits [N, 1, 48, 48] that it has not seen, with their labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    images = {"image_size": SIDE, "patch_size": PATCH, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**sizes, **images, attn_implementation="sdpa"))
    digits, labels = real_digits()
    learner = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(learner, 2e-3, steps)
    make = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(TRAINED, (BATCH,), generator=make)
        pixels = upscale(digits[chosen], SIDE, jitter(BATCH, 1.0, make))
        loss = model(pixels, labels=labels[chosen]).loss
        learner.zero_grad()
        loss.backward()
        learner.step()
        schedule.step()
    return model.eval(), upscale(digits[TRAINED:], SIDE), labels[TRAINED:]


@torch.no_grad()
def right(model: Any, digits: torch.Tensor, labels: torch.Tensor) -> str:
    """How many digits it reads."""
    found = torch.cat([model(part).logits.argmax(-1) for part in digits.split(100)])
    return f"reads {int((found == labels).sum())} of {len(labels)} held-out digits"


def read(call: Recorded, token: int) -> Picture:
    """What a token reads in each head, dense, under the smaller window, and the difference."""
    grid, first = call.layout.grid, call.layout.prefix
    found = maps.rows(call, [first + token], PATTERNS[-1])
    assert found.sparse is not None and found.difference is not None

    def planes(weights: torch.Tensor, head: int) -> Any:
        return plane(weights[0, head, 0, first:], grid)

    lines = []
    for head in range(call.q.shape[2]):
        most = float(found.difference[0, head, 0, first:].abs().max())
        shown = [rooted(planes(found.dense, head)), rooted(planes(found.sparse, head))]
        shown.append(signed(planes(found.difference, head), most))
        names = (f"head {head}, dense", PATTERNS[-1], "difference")
        lines.append(
            row([column([text(n, size=12), picture(p, SHOWN)], gap=2) for n, p in zip(names, shown, strict=True)])
        )
    return column(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "transformers.png")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--layer", type=int, default=1, help="whose heads are shown")
    options = parser.parse_args(arguments)
    model, digits, labels = trained(options.steps)
    one = digits[:1]
    lines = [f"dense: {right(model, digits, labels)}"]
    with torch.no_grad():
        stock = model(one).logits
    call = maps.calls(model, lambda: model(one))[options.layer]
    for pattern in PATTERNS:
        with visattn.apply(model, pattern, backend="tiles") as handle:
            said = right(model, digits, labels)
            site, *_ = handle.report().sites
        lines.append(f"{pattern}: {said}; density {site.density:.3f} in each of 4 layers")
    with torch.no_grad():
        assert torch.equal(model(one).logits, stock)
    lines.append("after remove(): the same logits to the bit")
    grid = call.layout.grid
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    pixels = ((one[0, 0] + 1) * 127.5).clamp(0, 255).byte().numpy()
    shown = enlarged(Image.fromarray(pixels), SHOWN)
    seen = column([text("the digit", size=12), shown], gap=2)
    parts = row([seen, read(call, middle)])
    made = column(
        [text("\n".join(lines)), text(f"What the token in the middle reads in {call.site}:"), parts], margin=12
    )
    with written_whole(options.out) as path:
        made.quantize(256).save(path, format="png", optimize=True)


if __name__ == "__main__":
    main()
