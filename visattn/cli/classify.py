"""`visattn classify`: what a timm model sees in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visattn.cli.options import JsonOption, print_json


def classify(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Annotated[str, typer.Option(help="A model of timm, or a backbone of `visattn models`.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or .pth of tensors only.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download timm's weights.")] = False,
    pattern: Annotated[str | None, typer.Option(help='Swap the attention, like "na(window=7x7)".')] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the image in pixels; the model's own.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes of the head; the checkpoint's.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 5,
    json: JsonOption = False,
) -> None:
    """Print the most likely classes of an image."""
    if checkpoint is None and not pretrained:
        raise ValueError("classify needs weights: pass --checkpoint FILE, or --pretrained to download timm's")
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained both give weights: pass one of them")
    found = _run(image, model, checkpoint, pretrained, pattern, size, classes, top)
    if json:
        print_json(found)
        return
    for entry in found["classes"]:
        typer.echo(f"{entry['probability']:7.2%}  {entry['index']:>5}  {entry['name']}".rstrip())
    if pattern:
        typer.echo(found["report"], err=True)


def _run(
    image: Path,
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    pattern: str | None,
    size: int | None,
    classes: int | None,
    top: int,
) -> dict[str, Any]:
    import contextlib

    import torch

    import visattn
    from visattn.models.load import as_input, class_name, create_with_weights, open_image, said_by_timm

    picture = open_image(image)
    if pattern is not None:
        visattn.parse(pattern)  # what is wrong with it is said before weights are downloaded
    model = create_with_weights(name, checkpoint, pretrained, size, classes)
    x = as_input(picture, model, size)
    with contextlib.ExitStack() as stack, torch.inference_mode(), said_by_timm(name, size):
        handle = stack.enter_context(visattn.apply(model, pattern)) if pattern else None
        probabilities = model(x).softmax(-1)[0]
        report = str(handle.report()) if handle else ""
    values, indices = probabilities.topk(min(top, len(probabilities)))
    entries = [
        {"index": index, "name": class_name(index, len(probabilities)), "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]
    return {"model": name, "pattern": pattern, "classes": entries, "report": report}
