"""Writes the table of docs/clients.md: which models of which client are known, from the records.

python -m scripts.clients
"""

from __future__ import annotations

from typing import NamedTuple

from scripts.pages import ROOT, rewrite, with_table

PAGE = ROOT / "docs" / "clients.md"


class Client(NamedTuple):
    """A program whose models can be patched.

    Attributes:
        name: What it is called.
        page: Its page.
        kind: What is counted.
        models: What is known.
    """

    name: str
    page: str
    kind: str
    models: tuple[str, ...]


def clients() -> tuple[Client, ...]:
    """The clients, with what is known of each."""
    from visattn.clients.comfy.records import RECORDS as COMFY
    from visattn.clients.sglang.plugin import MODELS as SGLANG
    from visattn.clients.transformers.records import RECORDS as TOWERS
    from visattn.clients.vllm_omni.plugin import MODELS as OMNI
    from visattn.models.swap.records import RECORDS as TIMM
    from visattn.pipelines.families import FAMILIES

    towers = tuple(record.models for record in TOWERS if not record.refused)
    attention = tuple(dict.fromkeys(TIMM[name].models for name in TIMM))
    diffusers = tuple(dict.fromkeys(family.name for family in FAMILIES.values() if not family.nothing))
    return (
        Client("diffusers", "diffusers.md", "families", diffusers),
        Client("timm", "timm.md", "kinds of attention", attention),
        Client("transformers", "transformers.md", "towers", towers),
        Client("ComfyUI", "comfyui.md", "classes", tuple(record.models for record in COMFY)),
        Client("vLLM-Omni", "vllm-omni.md", "models", OMNI),
        Client("SGLang", "sglang.md", "models", SGLANG),
    )


def table() -> str:
    """The table, a client a row."""
    lines = ["| client | known | models |", "| --- | --- | --- |"]
    for client in clients():
        count = len(client.models)
        known = f"{count} {client.kind if count > 1 else client.kind.removesuffix('s')}"
        lines.append(f"| [{client.name}]({client.page}) | {known} | {'; '.join(client.models)} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its table as the records are."""
    return with_table(page, "clients", table())


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    rewrite(PAGE, render, __doc__, arguments)


if __name__ == "__main__":
    main()
