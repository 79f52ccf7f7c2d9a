"""What `visattn maps` looks at: a model of timm, transformers or diffusers, and how to run it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Beginning of names of models of timm, as in `visattn tune`.
TIMM = "timm:"


class Subject(NamedTuple):
    """A model and one forward of it.

    Attributes:
        model: The model, not patched.
        forward: Runs it.
        classes: Whether it gives scores of classes.
        images: What it gets [N, C, H, W], None for a denoiser.
        scores: Images to scores, None without classes.
        picture: What it saw or made; None where that is no picture.
        name: What the picture is called.
        about: What was run, in words.
        sample: Whose rows are shown.
    """

    model: Any
    forward: Callable[[], Any]
    classes: bool
    images: Any
    scores: Callable[[Any], Any] | None
    picture: Any
    name: str
    about: str
    sample: int


def of_timm(
    name: str, images: Sequence[Path], checkpoint: Path | None, pretrained: bool, size: int | None, device: str
) -> Subject:
    """A model of timm on images; without weights it has random ones."""
    import torch

    from visattn.models.load import as_input, create_with_weights, open_image

    pictures = [open_image(path) for path in images]
    model: Any = create_with_weights(name, checkpoint, pretrained, size, None).to(device)
    x = torch.cat([as_input(picture, model, size) for picture in pictures]).to(device)
    weights = "" if checkpoint or pretrained else ", with random weights"
    classes = getattr(model, "num_classes", 0) > 1
    about = f"{name}{weights}; {len(images)} image{'s' * (len(images) > 1)}, {x.shape[-2]}x{x.shape[-1]} pixels"
    return Subject(
        model, lambda: model(x), classes, x, model if classes else None, seen(x[0], model), images[0].name, about, 0
    )


def of_transformers(name: str, images: Sequence[Path], pretrained: bool, size: int | None, device: str) -> Subject:
    """A classifier of transformers on images."""
    import torch

    from visattn.clients.transformers.load import as_pixels, load_classifier
    from visattn.models.load import open_image

    pictures = [open_image(path) for path in images]
    model, processor = load_classifier(name, pretrained)
    model = model.to(device)
    x = torch.cat([as_pixels(picture, processor, size)["pixel_values"] for picture in pictures]).to(device)

    def scores(pixels: Any) -> Any:
        return model(pixel_values=pixels).logits

    about = f"{name}; {len(images)} image{'s' * (len(images) > 1)}, {x.shape[-2]}x{x.shape[-1]} pixels"
    return Subject(model, lambda: scores(x), True, x, scores, seen(x[0], None), images[0].name, about, 0)


def of_pipeline(name: str, device: str, dtype: str | None, settings: dict[str, Any], step: int) -> Subject:
    """The denoiser of a pipeline at one step of a dense run."""
    import inspect

    from visattn.pipelines.asked import check_settings

    asked = {name: settings[name] for name in ("prompts", "labels", "guidance", "size", "seed")}
    check_settings(name, dtype, {f"--{count}": settings[count] for count in ("steps", "frames")}, **asked)
    import numpy as np

    from visattn.cli.loading import loaded_pipeline
    from visattn.pipelines.at_step import at_step
    from visattn.pipelines.generate import IMAGE, VIDEO, Settings, call_arguments, check
    from visattn.pipelines.report.video_files import to_picture

    pipe = loaded_pipeline(name, device, dtype, bars=True)
    output = VIDEO if "num_frames" in inspect.signature(pipe.__call__).parameters else IMAGE
    chosen = Settings(pattern="dense", output=output, **settings)
    check(pipe, chosen)
    found = at_step(pipe, call_arguments(pipe, chosen, 0), step)
    made = np.asarray(found.made.frames[0][0] if output == VIDEO else found.made.images[0], np.float32)
    what = chosen.prompts[0] if chosen.prompts else f"label {(*chosen.labels, 0)[0]}"
    about = f"{name}, step {step} of a dense run: {what}, seed {chosen.seed}"
    return Subject(found.model, found.forward, False, None, None, to_picture(made), f"made: {what}", about, -1)


def seen(x: Any, model: Any) -> Any:
    """What a model got [C, H, W], as a picture: its mean and deviation are undone where they are known."""
    import torch
    from PIL import Image

    config = getattr(model, "pretrained_cfg", None) or {}
    if "mean" in config and len(config["mean"]) == x.shape[0]:
        x = x * torch.tensor(config["std"]).to(x)[:, None, None] + torch.tensor(config["mean"]).to(x)[:, None, None]
    else:
        x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-12)
    whole = (x.float().clamp(0, 1) * 255).round().byte().cpu().movedim(0, -1)
    return Image.fromarray(whole.expand(*whole.shape[:2], 3).numpy() if whole.shape[-1] == 1 else whole.numpy())
