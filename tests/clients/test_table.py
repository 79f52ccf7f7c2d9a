"""docs/clients.md says which models of which client are known, and counts them."""

import re

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from scripts.clients import PAGE, clients, render
from visattn.clients.comfy.records import RECORDS as COMFY
from visattn.clients.transformers.records import RECORDS as TOWERS
from visattn.models.swap.records import RECORDS as ATTENTION
from visattn.pipelines.families import FAMILIES


def test_the_table_is_that_of_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert render(page) == page, "run python -m scripts.clients"
    rows = re.findall(r"^\| \[(.+?)\]\((.+?)\) \| (\d+) .+? \| (.+?) \|$", page, re.MULTILINE)
    counts = {name: int(count) for name, _, count, _ in rows}
    assert counts == {name: len(models.split("; ")) for name, _, _, models in rows}
    assert all((PAGE.parent / file).is_file() for _, file, _, _ in rows)
    towers = [record for record in TOWERS if not record.refused]
    assert counts["transformers"] == len(towers) == 48 and counts["ComfyUI"] == len(COMFY) == 8
    patched = {family.name for family in FAMILIES.values() if not family.nothing}
    assert counts["diffusers"] == len(patched) and "Sana" not in patched
    assert counts["timm"] == len({ATTENTION[name].models for name in ATTENTION})
    assert counts["vLLM-Omni"] == 3 and counts["SGLang"] == 1 and len(counts) == len(clients())


def test_pages_of_servers_name_their_models_and_variables():
    for client in clients()[-2:]:
        page = (PAGE.parent / client.page).read_text(encoding="utf-8").replace("\n", " ")
        assert "VISATTN_PATTERN" in page and all(model in page for model in client.models)
