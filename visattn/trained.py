"""What a distillation leaves: a small safetensors file of the trained tensors; their way into a model and out again.

Keys: `model.` and a parameter's path for a weight that was trained whole, `lora.` and a module's path for the two
factors `.A` [rank, in] and `.B` [out, rank] of a LoRA, `own.` for what belongs to the pattern itself (see
`Handle.parameters`). The metadata's entry "visattn" is JSON: model, pattern, layers, the scale of LoRA, and the
arguments of `visattn.convert_heads` where the student has other heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from visattn.files import read_tensors, written_whole
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
    # Of one that is missing, reading says so.
    stat = path.stat() if path.is_file() else None
    return _read(path, *((0, 0) if stat is None else (stat.st_mtime_ns, stat.st_size)))


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> Trained:
    """Kept until another file is read: generating many images asks for the same one again and again."""
    tensors, metadata = read_tensors(
        path, "file of weights", "name a student.safetensors that scripts.distill.pipeline wrote"
    )
    about = metadata.get(ABOUT)
    if about is None:
        raise ValueError(
            f"weights {path} were not written by scripts.distill.pipeline: their metadata has no {ABOUT!r}"
        )
    try:
        said = json.loads(about)
    except ValueError:
        raise ValueError(
            f"weights {path} were not written by scripts.distill.pipeline but are another file of visattn {about}, "
            "such as `visattn record` writes: name a student.safetensors"
        ) from None
    parts = {part: _below(tensors, f"{part}.") for part in ("model", "lora", "own")}
    factors = parts["lora"]
    names = sorted(name.removesuffix(".A") for name in factors if name.endswith(".A"))
    lora = {name: (factors[f"{name}.A"], factors[f"{name}.B"]) for name in names}
    return Trained(parts["model"], lora, parts["own"], said)


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def trained_weights(model: torch.nn.Module, trained: Trained) -> Iterator[None]:
    """Context in which the model has the trained weights, and the heads they are for; after it all is as before.

    Raises:
        ValueError: If a tensor does not fit the model.
    """
    undo = write_trained(model, trained)
    try:
        yield
    finally:
        undo()


def write_trained(model: torch.nn.Module, trained: Trained) -> Callable[[], None]:
    """Gives the model the trained weights, and the heads they are for; returns what makes all as it was, bit by bit.

    Raises:
        ValueError: If a tensor does not fit the model, or the model's weights are elsewhere.
    """
    with ExitStack() as stack:
        heads = trained.about.get("heads")
        if heads is not None:
            stack.enter_context(convert_heads(model, **heads))
        new = _new_weights(model, trained)
        parameters = dict(model.named_parameters())
        away = [name for name in new if parameters[name].is_meta]
        if away:
            raise ValueError(
                f"{away[0]} of {type(model).__name__} has no values here (device meta), so that no trained ones can be "
                "written: apply before enable_sequential_cpu_offload()"
            )
        stack.callback(_write, parameters, {name: parameters[name].detach().clone() for name in new})
        _write(parameters, new)
        return stack.pop_all().close


def is_student(pattern: object) -> bool:
    """Whether what `apply` is given for a pattern is the file of a student."""
    return isinstance(pattern, str | Path) and str(pattern).lower().endswith(".safetensors")


def student_model(target: Any, trained: Trained) -> torch.nn.Module:
    """The model of a pipeline, or the model itself, that the trained weights are for.

    Raises:
        ValueError: If they fit none, or several.
    """
    if isinstance(target, torch.nn.Module):
        return getattr(target, "_orig_mod", target)
    parts = getattr(target, "components", {})
    models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    names = [*trained.model, *(f"{path}.weight" for path in trained.lora)]
    names += [f"{path.replace('/', '.').rpartition('.')[0]}." for path in trained.own]
    fit = {name: model for name, model in models.items() if _has(model, names)}
    if len(fit) != 1:
        found = "no model of" if not fit else f"{' and '.join(fit)}, several models of"
        raise ValueError(f"the trained weights fit {found} {type(target).__name__}: {_made_for(trained)}")
    return next(iter(fit.values()))


def _has(model: torch.nn.Module, names: list[str]) -> bool:
    """Whether a model has parameters of these names, or some that begin so where a name ends in a dot."""
    own = [name for name, _ in model.named_parameters()]
    known = set(own)
    return all(name in known or (name.endswith(".") and any(each.startswith(name) for each in own)) for name in names)


def export_student(pipe: Any, path: Path, folder: Path, moves: Path | None = None) -> Trained:
    """Writes a pipeline with a student's weights as a plain folder of diffusers, LoRA multiplied out.

    What the pattern itself learned has no place in such a folder: it goes into student.safetensors beside it, with
    the name of the pattern, which `apply(pipe, folder / "student.safetensors")` takes. Without that the folder's
    pipeline runs dense attention.

    Args:
        pipe: The teacher's pipeline, not patched.
        path: File of the student.
        folder: For the result.
        moves: Where the folder is moved to when it is whole, if that is another.

    Returns:
        What is in that file.

    Raises:
        ValueError: If the weights do not fit the pipeline, or are of other heads than such a folder can tell.
    """
    trained = load_trained(path)
    if trained.about.get("heads") is not None:
        raise ValueError(
            f"{path} is of a student with other heads, which a folder of {type(pipe).__name__} cannot tell: keep the "
            "file, and apply(pipe, file)"
        )
    with trained_weights(student_model(pipe, trained), trained):
        pipe.save_pretrained(folder)
    rest = Trained({}, {}, trained.own, dict(trained.about) | {"model": str(moves or folder)})
    save_trained(folder / path.name, rest)
    return rest


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
