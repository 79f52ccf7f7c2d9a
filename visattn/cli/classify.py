"""`visattn classify`: what a model of timm or transformers sees in an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.options import JsonOption, check_above, print_json, unused

if TYPE_CHECKING:
    import torch


def classify(
    image: Annotated[Path, typer.Argument(help="An image file; with --probe a folder with a subfolder a class.")],
    model: Annotated[str, typer.Option(help="A model of timm, or a folder or repository of transformers.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or .pth of tensors only.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download the weights.")] = False,
    pattern: Annotated[str | None, typer.Option(help='Swap the attention, like "na(window=7x7)".')] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the image in pixels.", show_default="the model's own")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the head.", show_default="the checkpoint's")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 5,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train a probe on the frozen model instead: what it knows of these classes.")
    ] = False,
    queries: Annotated[int, typer.Option(min=1, help="Of the probe.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Of the probe's training.")] = 90,
    rate: Annotated[float, typer.Option(help="Its learning rate, of 256 images at once.")] = 0.1,
    json: JsonOption = False,
) -> None:
    """Print the most likely classes of an image, or what a probe learns of a folder of images."""
    from visattn.clients.transformers.load import is_of_transformers

    if probe:
        unused("of the classes of one image, and --probe learns from a folder", top=top != 5)
    else:
        unused("for --probe", queries=queries != 32, epochs=epochs != 90, rate=rate != 0.1)
    if is_of_transformers(model):
        if probe:
            raise ValueError(f"--probe is for models of timm, and {model} is one of transformers: leave it out")
        if checkpoint is not None or classes is not None:
            raise ValueError(
                f"{model} of transformers has its weights and classes: leave --checkpoint and --classes out"
            )
        _give(_run_transformers(image, model, pretrained, pattern, size, top), pattern, json)
        return
    if checkpoint is None and not pretrained:
        raise ValueError("classify needs weights: pass --checkpoint FILE, or --pretrained to download timm's")
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained both give weights: pass one of them")
    if probe:
        from visattn.cli.classify_probe import probe as run

        if classes is not None:
            raise ValueError("--classes is of the model's head, and --probe has a classifier of its own: leave it out")
        check_above("--rate", rate, 0)
        options = {"queries": queries, "epochs": epochs, "rate": rate}
        run(image, model, checkpoint, pretrained, pattern, size, options, json)
        return
    _give(_run(image, model, checkpoint, pretrained, pattern, size, classes, top), pattern, json)


def _give(found: dict[str, Any], pattern: str | None, json: bool) -> None:
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
    import torch

    import visattn
    from visattn.models.load import as_input, class_name, create_with_weights, open_image, said_by_timm

    picture = open_image(image)
    if pattern is not None:
        visattn.parse(pattern)  # what is wrong with it is said before weights are downloaded
    model = create_with_weights(name, checkpoint, pretrained, size, classes)
    x = as_input(picture, model, size)
    with torch.inference_mode(), said_by_timm(name, size):
        probabilities, report = _forward(model, pattern, lambda: model(x))
    entries = _top(probabilities, top, lambda index: class_name(index, len(probabilities)))
    return {"model": name, "pattern": pattern, "classes": entries, "report": report}


def _run_transformers(
    image: Path, name: str, pretrained: bool, pattern: str | None, size: int | None, top: int
) -> dict[str, Any]:
    import torch

    import visattn
    from visattn.clients.transformers.load import as_pixels, label, load_classifier
    from visattn.models.load import open_image

    picture = open_image(image)
    if pattern is not None:
        visattn.parse(pattern)
    model, processor = load_classifier(name, pretrained)
    x = as_pixels(picture, processor, size)
    with torch.inference_mode():
        probabilities, report = _forward(model, pattern, lambda: model(**x).logits)
    entries = _top(probabilities, top, lambda index: label(model, index))
    return {"model": name, "pattern": pattern, "classes": entries, "report": report}


def _forward(model: Any, pattern: str | None, logits: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, str]:
    """Probabilities of the classes of one image, and the report of a pattern."""
    import visattn

    # What is shown is the pattern.
    with visattn.apply(model, pattern, always=True) if pattern else contextlib.nullcontext() as handle:
        return logits().softmax(-1)[0], str(handle.report()) if handle else ""


def _top(probabilities: torch.Tensor, count: int, name: Callable[[int], str]) -> list[dict[str, Any]]:
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return [
        {"index": index, "name": name(index), "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]
