"""A canary over the installed diffusers: every model class has a record or a reason why not."""

import functools
import importlib
import inspect
import json
import pkgutil
import re

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers.models import controlnets, transformers, unets
from packaging.version import Version
from typer.testing import CliRunner

import visattn
from tests.support import tiny_models
from tests.support.places import ROOT
from visattn.cli import app
from visattn.pipelines.families import FAMILIES, find_family, unknown, why_unknown

LISTED = Version(unknown.RELEASE)
# Modules of pipelines that hold a model.
ELSEWHERE = (
    "diffusers.pipelines.audioldm2.modeling_audioldm2",
    "diffusers.models.autoencoders.ltx2_diffusion_decoder",
)
# What denoises nothing in these modules.
HELPERS = {"AudioLDM2ProjectionModel"}


@functools.cache
def released():
    """The transformer, UNet and ControlNet classes of the installed release."""
    names = [name for package in (transformers, unets, controlnets) for name in _modules(package)]
    found = {}
    for name in (*names, *ELSEWHERE):
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin) and kind.__module__ == name:
                found[kind.__name__] = kind
    return {name: kind for name, kind in found.items() if name not in HELPERS}


def _modules(package):
    found = pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    return [info.name for info in found if not info.name.endswith("_flax")]


def unanswered(kinds):
    """Classes with neither a record, their own or of a class they extend, nor a reason."""
    given = {*FAMILIES, *unknown.NOT_SPARSE, *unknown.NOT_YET, *unknown.CONTAINERS}
    return sorted(name for name, kind in kinds.items() if given.isdisjoint(base.__name__ for base in kind.__mro__))


def test_every_class_of_the_release_has_a_record_or_a_reason():
    assert len(released()) > 60
    missing = unanswered(released())
    assert not missing, (
        f"diffusers {diffusers.__version__} has {', '.join(missing)}, of which visattn knows nothing: write a record "
        "in pipelines/families/, or the reason why there is none into pipelines/families/unknown.py"
    )


def test_the_canary_sees_a_new_class():
    new = type("NewTransformer2DModel", (diffusers.ModelMixin,), {})
    assert unanswered({**released(), new.__name__: new}) == ["NewTransformer2DModel"]


def test_reasons_are_of_classes_without_a_record():
    lists = [set(unknown.NOT_SPARSE), set(unknown.NOT_YET), set(unknown.CONTAINERS), set(FAMILIES)]
    assert len(set.union(*lists)) == sum(map(len, lists))
    if Version(diffusers.__version__) < LISTED:
        pytest.skip(f"the lists are of diffusers {LISTED}")
    gone = set.union(*lists[:3]) - set(released())
    assert not gone, f"diffusers {diffusers.__version__} has no {', '.join(sorted(gone))}: drop the reasons"


@pytest.mark.parametrize("name", [*unknown.NOT_SPARSE, *unknown.NOT_YET])
def test_the_error_says_the_reason_and_how_to_give_a_layout(name):
    model = type(name, (diffusers.ModelMixin,), {})()
    assert find_family(model) is None and why_unknown(model) == unknown.reason(name)
    with pytest.raises(ValueError) as error:
        visattn.apply(model, "na(window=3x3)")
    assert unknown.reason(name) in str(error.value)
    assert "pass layout=Layout(grid, prefix=..., suffix=...)" in str(error.value)


def test_a_class_with_a_reason_still_takes_a_layout():
    model, inputs = tiny_models.prior_transformer()
    with pytest.raises(ValueError, match=r"pass layout=.*\(nothing to sparsify: .* has no grid\); known"):
        visattn.apply(model, "na(window=3)")
    assert inputs


def test_models_lists_known_classes_and_reasons():
    found = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    known = [name for names in found["diffusers"].values() for name in names]
    assert sorted(known) == sorted(name for name, family in FAMILIES.items() if not family.nothing)
    nothing = {name for name, family in FAMILIES.items() if family.nothing}
    assert set(found["unknown"]) == {*unknown.NOT_SPARSE, *unknown.NOT_YET} | nothing
    text = CliRunner().invoke(app, ["models"]).stdout
    assert all(why in text for why in found["unknown"].values()) and "layout=Layout(grid" in text


def test_the_page_names_every_known_class_and_their_number():
    """That the table and the counts are made of the records is a test of all figures, in tests/scripts."""
    page = (ROOT / "docs/diffusers.md").read_text()
    known = {name for name, family in FAMILIES.items() if not family.nothing}
    table = page.split("<!-- table: families -->")[1].split("<!-- end: families -->")[0]
    assert set(re.findall(r"\b\w+(?:Model|UNet|Transformer)\b", table)) == known
    assert f"{len(known)} model classes are known" in page.split("<!-- table: families-counts -->")[1]
