"""`visattn doctor --model`: what is known of a model, which attention would be patched, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def examine(model: str) -> list[dict[str, Any]]:
    """What is known of each model in a folder of diffusers, of an embedded model or of a model of timm.

    Nothing is downloaded and no weight is read.

    Args:
        model: The folder of a pipeline or model, or the name of an embedded model or of timm (also `timm:NAME`).

    Returns:
        For each model `part`, `class`, `family`, `tokens`, `sites` (paths), `grid` and `why` ("" if it is known).

    Raises:
        ValueError: If it is neither.
    """
    from visattn.pipelines.embedded import EMBEDDED

    folder = EMBEDDED[model].folder if model in EMBEDDED and not Path(model).exists() else Path(model)
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            config = _config(folder / name)
            return _parts(folder, config) if name == "model_index.json" else [_examine_diffusers("", config)]
    if folder.exists():
        raise ValueError(f"{model} must be the folder of a pipeline (model_index.json) or of a model (config.json)")
    return [_examine_timm(model.removeprefix("timm:"))]


def _config(file: Path) -> dict[str, Any]:
    """What a file of a folder in diffusers' format says.

    Raises:
        ValueError: If it is no mapping in JSON.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a mapping in JSON, and is a {type(found).__name__}")
    return found


def _parts(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a pipeline that denoise or control."""
    from visattn.pipelines.patch.targets import CONTROLNETS, DENOISERS

    found = []
    for name in (*DENOISERS, *CONTROLNETS):
        file = folder / name / "config.json"
        if index.get(name) and file.is_file():
            found.append(_examine_diffusers(name, _config(file)))
    if not found:
        names = ", ".join((*DENOISERS, *CONTROLNETS))
        raise ValueError(f"{folder} has none of the models {names} with a config.json: name the folder of a model")
    return found


def _examine_diffusers(part: str, config: dict[str, Any]) -> dict[str, Any]:
    import diffusers
    import torch

    from visattn.pipelines.families import find_family, why_unknown

    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not name and "model_type" in config:
        raise ValueError(
            f"its config.json is that of a model of transformers ({config['model_type']}): load it, apply a pattern "
            "and print the handle's report(), see docs/transformers.md"
        )
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ValueError(
            f"its config.json names {name or 'no _class_name'}, which is no model of diffusers "
            f"{diffusers.__version__}: name another folder, or install a version that has it"
        )
    try:
        with torch.device("meta"):
            built: Any = kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:
        # Whatever its code finds wrong with a config that somebody has changed.
        raise ValueError(f"diffusers cannot build {name} from its config.json: {error}") from None
    family, found = (
        find_family(built),
        {"part": part, "class": name, "family": "", "tokens": "", "sites": [], "grid": ""},
    )
    if family is None:
        why = why_unknown(built) or "visattn does not know its class"
        return {**found, "why": f"{why}; pass layout=Layout(grid, prefix=..., suffix=...)"}
    if family.nothing:
        return {**found, "family": family.name, "why": f"nothing to sparsify: {family.nothing}"}
    paths = [site.path for site, _ in family.find_sites(built)]
    grid = _usual_grid(family.of(built.config).dims, built.config) if not family.read else ""
    found |= {"family": family.name, "tokens": family.tokens, "sites": paths}
    return {**found, "grid": grid or "told by its forward", "why": "" if paths else "it has no visual self-attention"}


def _usual_grid(dims: int, config: Any) -> str:
    """The grid of the size that a config names, "" if it names none."""
    from visattn.pipelines.families.base import patches

    side = getattr(config, "sample_size", None)
    given = side if isinstance(side, tuple | list) else (side, side)
    sizes = tuple(n for n in given if isinstance(n, int))
    if dims != 2 or len(given) != 2 or len(sizes) != 2:
        return ""
    size = "x".join(map(str, sizes))
    return f"{'x'.join(map(str, patches(config, sizes)))} at its usual {size} latents"


def _examine_timm(name: str) -> dict[str, Any]:
    import timm
    import torch

    import visattn.models  # registers backbones  # noqa: F401
    from visattn.models.load import check_known
    from visattn.models.swap.sites import find_sites

    if any(mark in name for mark in "/\\."):
        raise ValueError(
            f"folder {name} does not exist: name that of a diffusers pipeline or model, or a model of timm"
        )
    check_known(name)
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    found = {"part": "", "class": type(model).__name__, "family": "timm", "tokens": "", "sites": [], "grid": ""}
    try:
        sites = find_sites(model, type(model).__name__)
    except ValueError as error:
        return {**found, "why": str(error)}
    foreign = sorted({site.foreign for site in sites if site.foreign})
    feature = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    grid = f"{'x'.join(map(str, feature))} at its usual size" if feature else "told by its forward"
    paths = [site.name.path for site in sites if not site.foreign]
    return {**found, "sites": paths, "grid": grid, "why": "; ".join(foreign)}
