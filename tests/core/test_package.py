"""The package as a whole: what importing it costs and installs."""

import importlib.metadata
import json
import pkgutil
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
from packaging.requirements import Requirement

import visattn
from tests.support.places import ROOT


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_visattn_loads_no_heavy_package():
    loaded = json.loads(python("import sys, json, visattn; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "diffusers", "timm", "triton", "transformers", "numpy"} & set(loaded)


def test_importing_the_core_loads_neither_diffusers_nor_timm_nor_triton_nor_natten():
    code = (
        "import sys, json, torch; before = set(sys.modules); import visattn; visattn.attention; visattn.apply;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.partition(".")[0] for name in json.loads(python(code))}
    assert not {"diffusers", "timm", "triton", "transformers", "natten", "xformers"} & roots


def test_plugins_of_servers_load_nothing_where_nobody_asks():
    code = (
        "import sys, os, json; os.environ.pop('VISATTN_PATTERN', None); os.environ.pop('VISATTN_CONFIG', None);"
        "from visattn.clients.sglang.plugin import register; register(); import visattn.clients.vllm_omni.plugin;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not {"torch", "numpy", "sglang", "vllm_omni", "aenum"} & set(json.loads(python(code)))


def test_every_public_name_resolves():
    assert all(getattr(visattn, name) is not None for name in visattn.__all__)
    assert set(visattn.__all__) == set(dir(visattn))


def test_no_submodule_hides_a_public_name():
    # Importing a submodule binds its name in the package, so one called `plan` would replace the function.
    submodules = {module.name for module in pkgutil.iter_modules(visattn.__path__)}
    assert submodules & set(visattn.__all__) == {"maps", "patterns"}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'attend_all'; it has .*attention"):
        getattr(visattn, "attend_all")  # noqa: B009


def test_only_the_package_itself_is_installed():
    top = importlib.metadata.distribution("visattn").read_text("top_level.txt")
    assert (top or "visattn").split() == ["visattn"]
    assert importlib.metadata.version("visattn") == visattn.__version__


def test_every_folder_of_code_is_a_package_that_gets_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = settings["package-dir"]
    listed = set(settings["packages"])
    found = set()
    for package, place in places.items():
        folders = [file.parent.relative_to(ROOT / place) for file in (ROOT / place).rglob("*.py")]
        found |= {".".join((package, *folder.parts)) for folder in folders}
    # rglob follows no links, so the rooms are found under their own names only.
    assert listed == found


def test_the_changelog_speaks_of_this_version():
    assert f"## [{visattn.__version__}]" in (text := (ROOT / "CHANGELOG.md").read_text()) or "## [Unreleased]" in text


def test_the_oldest_libraries_of_the_workflow_are_those_that_the_package_claims():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    claims = [Requirement(text) for text in chain(project["dependencies"], extras)]
    lowest = {claim.name: str(claim.specifier).removeprefix(">=") for claim in claims if claim.specifier}
    lines = (ROOT / ".github" / "oldest.txt").read_text().splitlines()
    installed = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {r.name: str(r.specifier).removeprefix("==").removesuffix(".*") for r in installed} == {
        name: lowest[name] for name in ("torch", "diffusers", "timm")
    }
