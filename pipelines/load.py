"""Load a pipeline by the name a user types: an embedded model, a folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from visattn.environment import check_device
from visattn.memory import is_shortage
from visattn.pipelines.asked import check_dtype, check_model
from visattn.pipelines.embedded import EMBEDDED, load_embedded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(model: str, device: str = "cpu", dtype: str | None = None) -> DiffusionPipeline:
    """Load a diffusers pipeline; only safetensors are read.

    Args:
        model: Name of an embedded model, a folder in diffusers' format, or an id on the hub.
        device: Where it goes, like "cpu" or "cuda:0".
        dtype: Name of a dtype of `visattn.pipelines.asked.DTYPES`; float32 on a CPU, bfloat16 elsewhere if None.

    Raises:
        ValueError: If the model cannot be found or read, or device or dtype do not exist.
    """
    target = check_device(device)
    check_dtype(dtype)
    check_model(model)
    kind = getattr(torch, dtype or ("float32" if target.type == "cpu" else "bfloat16"))
    with warnings.catch_warnings():
        # Newer diffusers call it dtype; older ones would ignore that name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = load_embedded(model, torch_dtype=kind) if model in EMBEDDED else _from_pretrained(model, kind)
    _check_whole(pipe, model)
    return pipe.to(target)


def _check_whole(pipe: DiffusionPipeline, model: str) -> None:
    """Raise a ValueError if a component has parameters that no file gave: diffusers leaves them without values."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            missing = [path for path, value in part.named_parameters() if value.is_meta]
            if missing:
                more = f" and {len(missing) - 1} more" * (len(missing) > 1)
                raise ValueError(
                    f"cannot load the pipeline in {model}: the weights of {name} lack {missing[0]}{more}, so they are "
                    "not those of its config.json"
                )


def _from_pretrained(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    folder = Path(model)
    try:
        return DiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, use_safetensors=True, **({"local_files_only": True} if folder.is_dir() else {})
        )
    except Exception as error:
        if is_shortage(error):
            raise
        if folder.is_dir():
            # What is wrong in a folder shows in whatever its loading stumbles over.
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"cannot load the pipeline in {model}: {kind}{error}") from error
        if not isinstance(error, OSError | ValueError):
            raise
        raise ValueError(
            f"cannot get {model!r} from the hub ({_first_sentence(error)}). Without network, download it elsewhere and "
            "pass the path of its folder: --model path/to/folder"
        ) from error


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"\. | \(", text)[0].rstrip(".")
