"""`visattn comfy`: writes the nodes into a folder of ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FOLDER = "visattn"


def comfy(
    path: Annotated[Path, typer.Argument(help="ComfyUI's folder, or its custom_nodes.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an older folder of ours.")] = False,
) -> None:
    """Write the nodes "Sparse Attention (visattn)", "Tuned Attention" and "Attention Report" into ComfyUI."""
    from importlib.resources import files

    nodes = path if path.name == "custom_nodes" else path / "custom_nodes"
    if not nodes.is_dir():
        raise ValueError(f"{path} is no folder of ComfyUI: it has no custom_nodes")
    target = nodes / FOLDER
    if target.exists() and not force:
        raise ValueError(f"{target} exists: pass --force to write it anew")
    target.mkdir(exist_ok=True)
    for source in (files("visattn.clients.comfy") / "shim").iterdir():
        if source.name.endswith((".toml", ".txt")):
            # As Python it would be a package of ours that imports ComfyUI.
            name = source.name.replace("entry.txt", "__init__.py")
            (target / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"wrote {target}; ComfyUI's Python needs visattn: pip install visattn")
