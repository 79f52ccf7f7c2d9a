"""Fine-tunes a ViT of timm with neighborhood attention on a folder of pictures, one folder per class.

    python docs/examples/timm_finetune.py --data pictures --model vit_small_patch16_224 --image-size 512

Prints the accuracy with stock attention, with the pattern as it is, and after training with the pattern. `pictures` has
`train/CLASS/*.jpg` and `val/CLASS/*.jpg`. Needs `pip install 'visattn[timm]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import visattn


def options(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and val")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--untrained", action="store_true", help="start from random weights")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--pattern", default="na(window=15x15)")
    parser.add_argument("--dense-layers", type=int, default=0, help="so many of the first layers stay dense")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/finetuned.safetensors"))
    return parser.parse_args(arguments)


def loaders(model: nn.Module, chosen: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Pictures to learn from and to judge by, prepared as the model wants them."""
    config = timm.data.resolve_model_data_config(model, {"img_size": chosen.image_size})
    made = []
    for part, training in (("train", True), ("val", False)):
        data: Any = timm.data.create_dataset("", root=chosen.data / part, split=part)
        data.transform = timm.data.create_transform(**config, is_training=training)
        made.append(DataLoader(data, chosen.batch, shuffle=training, num_workers=chosen.workers))
    return made[0], made[1]


@torch.no_grad()
def accuracy(model: nn.Module, pictures: DataLoader, device: torch.device) -> float:
    """Share of the pictures that are read right."""
    model.eval()
    right = [model(x.to(device)).argmax(-1).cpu() == y for x, y in pictures]
    return float(torch.cat(right).float().mean())


def train(model: nn.Module, pictures: DataLoader, chosen: argparse.Namespace, device: torch.device) -> None:
    """AdamW with a cosine, the usual fine-tuning: the pattern needs no code of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, chosen.epochs * len(pictures)))
    for epoch in range(chosen.epochs):
        model.train()
        for x, y in pictures:
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def main(arguments: list[str] | None = None) -> None:
    """Judge, swap, judge, train, judge, save."""
    chosen = options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = sum(folder.is_dir() for folder in (chosen.data / "train").iterdir())
    model = timm.create_model(
        chosen.model, pretrained=not chosen.untrained, num_classes=classes, img_size=chosen.image_size
    ).to(device)
    learn, judge = loaders(model, chosen)

    print(f"stock attention: {accuracy(model, judge, device):.1%} right (a new head guesses)")
    # always: what is trained is what is judged, also where dense attention would be faster.
    handle = visattn.apply(model, chosen.pattern, dense_layers=chosen.dense_layers, always=True)
    print(f"{chosen.pattern} as it is: {accuracy(model, judge, device):.1%}")
    train(model, learn, chosen, device)
    print(f"{chosen.pattern} after {chosen.epochs} epochs: {accuracy(model, judge, device):.1%}")
    print(handle.report())

    # The names are timm's own, so the file loads into a stock model too; apply the pattern again to use it as trained.
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), chosen.out)
    print(f"saved {chosen.out}")


if __name__ == "__main__":
    main()
