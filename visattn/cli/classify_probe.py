"""`visattn classify --probe`: what a frozen backbone still knows, dense and under a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from visattn.cli.options import print_json


def probe(
    folder: Path,
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    pattern: str | None,
    size: int | None,
    options: dict[str, Any],
    json: bool,
) -> None:
    """Train a probe on half of the images of a folder, for the model dense and with a pattern; the other half tells."""
    found = _probed(folder, name, checkpoint, pretrained, pattern, size, options)
    if json:
        print_json(found)
        return
    typer.echo(
        f"{name}: {found['trained']} images to train with, {found['held_out']} held out, {found['classes']} classes"
    )
    for each in found["probes"]:
        typer.echo(
            f"{each['accuracy']:7.2%}  {each['pattern']} (loss {each['loss']:.3f}, {each['parameters']:,} parameters)"
        )


def _probed(
    folder: Path,
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    pattern: str | None,
    size: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    import torch

    import visattn
    from visattn.models.load import create_with_weights, said_by_timm
    from visattn.models.probe import halves, tokens_of, train
    from visattn.models.tuning.pictures import Pictures

    if pattern is not None:
        visattn.parse(pattern)
    if not folder.is_dir():
        raise ValueError(f"--probe learns from a folder with a subfolder of images for each class: {folder} is none")
    model = create_with_weights(name, checkpoint, pretrained, size, None)
    pictures = Pictures.of_folder(folder, model, size)
    if pictures.labels is None:
        raise ValueError(f"--probe needs classes: give {folder} a subfolder with the images of each")
    labels = torch.tensor(pictures.labels)
    first, second = halves(labels)

    def batches() -> Any:
        for some in range(0, pictures.count, 32):
            yield torch.stack([pictures.get(i) for i in range(some, min(some + 32, pictures.count))])

    probes = []
    for each in dict.fromkeys(["dense", pattern or "dense"]):
        with said_by_timm(name, size):
            if each == "dense":
                tokens = tokens_of(model, batches())
            else:
                # What is measured is the pattern.
                with visattn.apply(model, each, always=True):
                    tokens = tokens_of(model, batches())
        learned = train(tokens[first], labels[first], (tokens[second], labels[second]), **options)
        count = sum(p.numel() for p in learned.classifier.parameters())
        probes.append({"pattern": each, "accuracy": learned.accuracy, "loss": learned.loss, "parameters": count})
    return {
        "model": name,
        "trained": len(first),
        "held_out": len(second),
        "classes": len(labels.unique()),
        "probes": probes,
    }
