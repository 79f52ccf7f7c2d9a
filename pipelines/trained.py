"""What a distillation leaves: a small safetensors file of the trained tensors; their way into a model and out again.

Keys: `model.` and a parameter's path for a weight that was trained whole, `lora.` and a module's path for the two
factors `.A` [rank, in] and `.B` [out, rank] of a LoRA, `own.` for what belongs to the pattern itself (see
`Handle.parameters`). The metadata's entry "visattn" is JSON: model, pattern, layers, the scale of LoRA, and the
arguments of `visattn.convert_heads` where the student has other heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visattn.files import written_whole
from visattn.heads.convert import convert_heads

ABOUT = "visattn"


@dataclass(frozen=True, eq=False)
class Trained:
    """The content of such a file.

    Attributes:
        model: Weights by path.
        lora: Factors (A, B) by path of the module.
        own: Parameters of the pattern by path.
        about: What is known about the training: "model", "pattern", "layers", "dense_layers", "lora_scale", ...
    """

    model: Mapping[str, torch.Tensor]
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    own: Mapping[str, torch.Tensor]
    about: Mapping[str, Any]


def save_trained(path: Path, trained: Trained) -> None:
    """Writes the file whole or not at all."""
    tensors = {f"model.{name}": value for name, value in trained.model.items()}
    tensors |= {f"own.{name}": value for name, value in trained.own.items()}
    for name, (a, b) in trained.lora.items():
        tensors |= {f"lora.{name}.A": a, f"lora.{name}.B": b}
    with written_whole(path) as temporary:
        ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(ready, temporary, {ABOUT: json.dumps(dict(trained.about))})


def load_trained(path: Path) -> Trained:
    """Reads such a file.

    Raises:
        ValueError: If it is missing or something else.
    """
    if not path.is_file():
        raise ValueError(f"weights {path} do not exist: name a student.safetensors that scripts.distill.pipeline wrote")
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> Trained:
    """Kept until another file is read: generating many images asks for the same one again and again."""
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(ABOUT)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"weights {path} are no safetensors file ({error})") from error
    if about is None:
        raise ValueError(
            f"weights {path} were not written by scripts.distill.pipeline: their metadata has no {ABOUT!r}"
        )
    parts = {part: _below(tensors, f"{part}.") for part in ("model", "lora", "own")}
    factors = parts["lora"]
    names = sorted(name.removesuffix(".A") for name in factors if name.endswith(".A"))
    lora = {name: (factors[f"{name}.A"], factors[f"{name}.B"]) for name in names}
    return Trained(parts["model"], lora, parts["own"], json.loads(about))


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def trained_weights(model: torch.nn.Module, trained: Trained) -> Iterator[None]:
    """Context in which the model has the trained weights, and the heads they are for; after it all is as before.

    Raises:
        ValueError: If a tensor does not fit the model.
    """
    heads = trained.about.get("heads")
    with nullcontext() if heads is None else convert_heads(model, **heads):
        new = _new_weights(model, trained)
        parameters = dict(model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in new}
        _write(parameters, new)
        try:
            yield
        finally:
            _write(parameters, kept)


def load_own(handle: Any, trained: Trained) -> None:
    """Gives the parameters that belong to the handle's patterns their trained values.

    Args:
        handle: What `visattn.apply` returned for the pattern of the training.
        trained: The content of the file.

    Raises:
        ValueError: If the handle's patterns have other parameters than those in the file.
    """
    module = getattr(handle, "parameters", None)
    own = dict(module.named_parameters()) if isinstance(module, torch.nn.Module) else {}
    shapes = [{name: list(value.shape) for name, value in each.items()} for each in (own, trained.own)]
    if trained.own and shapes[0] != shapes[1]:
        raise ValueError(
            f"the weights hold {len(trained.own)} parameters of the pattern {trained.about.get('pattern')!r}, and the "
            f"pattern applied has {len(own)}, or of other shapes: pass --pattern {trained.about.get('pattern')!r}"
        )
    _write(own, trained.own)


def _new_weights(model: torch.nn.Module, trained: Trained) -> dict[str, torch.Tensor]:
    """Weights by path, LoRA multiplied out."""
    parameters, new = dict(model.named_parameters()), dict(trained.model)
    scale = trained.about.get("lora_scale", 1.0)
    for name, (a, b) in trained.lora.items():
        if f"{name}.weight" not in parameters:
            raise ValueError(f"the trained module {name} is not in this {type(model).__name__}: {_made_for(trained)}")
        weight = parameters[f"{name}.weight"]
        new[f"{name}.weight"] = weight.float() + scale * (b.float() @ a.float()).to(weight.device)
    for name, value in new.items():
        own = parameters.get(name)
        if own is None or own.shape != value.shape:
            has = "nothing" if own is None else str(list(own.shape))
            raise ValueError(
                f"the trained tensor {name} {list(value.shape)} does not fit this {type(model).__name__}, which has "
                f"{has} there: {_made_for(trained)}"
            )
    return new


def _made_for(trained: Trained) -> str:
    return f"the weights are for {trained.about.get('model')!r}"


@torch.no_grad()
def _write(parameters: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    for name, value in new.items():
        parameters[name].copy_(value)
