"""The API reference: every public name is on it, with a docstring that says everything."""

import dataclasses
import inspect
import re
import types

import pytest
import typer

import visattn
from scripts import tree
from scripts.pages import ROOT
from scripts.site import BLOCK
from visattn.cli import app
from visattn.patterns import PATTERNS

PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")}
REFERENCE = "\n".join(PAGES.values())
NAMES = [name for name in visattn.__all__ if isinstance(getattr(visattn, name), (type, types.FunctionType))]


def sections(doc):
    """Sections of a Google docstring, and the names that each lists."""
    found = re.split(r"^(Args|Attributes|Returns|Raises|Yields):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return {
        title: set(re.findall(r"^    \*{0,2}(\w+)(?: \([^)]*\))?:", body, re.MULTILINE))
        for title, body in zip(found[1::2], found[2::2], strict=True)
    }


def fields(kind):
    """Public fields of a dataclass that a caller may pass."""
    if not dataclasses.is_dataclass(kind):
        return set()
    return {field.name for field in dataclasses.fields(kind) if field.init and not field.name.startswith("_")}


@pytest.mark.parametrize("name", sorted(set(visattn.__all__) - {"__version__", "patterns"}))
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf"^::: visattn\.{name}$", REFERENCE, re.MULTILINE), f"add `::: visattn.{name}` to docs/reference"


def test_the_help_of_every_command_is_in_the_reference():
    command = typer.main.get_command(app)
    names = [name for name, each in command.commands.items() if not hasattr(each, "commands") and not each.hidden]
    names += [f"{name} {sub}" for name, each in command.commands.items() for sub in getattr(each, "commands", ())]
    # A block of one line is what the site puts the help below.
    assert {words[8:-7] for words in BLOCK.findall(PAGES["cli.md"])} == set(names)


def test_the_guide_has_every_argument_of_apply():
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    table = page.partition("## Arguments")[2].partition("\n\nLayers are counted")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)}
    assert {*inspect.signature(visattn.apply).parameters} - {"target"} <= named


@pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.name)
def test_every_pattern_is_in_the_reference_and_the_gallery(kind):
    assert re.search(rf"^::: visattn\.patterns\.{kind.__name__}$", PAGES["patterns.md"], re.MULTILINE)
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert re.search(rf'["`]{kind.name}[("`]', gallery), (
        f"add a picture of {kind.name}, or a line under Without a picture"
    )


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_everything(name):
    check(getattr(visattn, name))


@pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.name)
def test_docstrings_of_patterns_say_everything(kind):
    check(kind)
    if kind.name != "dense":
        assert "Source" in kind.__doc__


def check(thing):
    doc = thing.__doc__
    assert doc and doc.splitlines()[0].endswith("."), f"{thing.__qualname__}: the first line must be a sentence"
    found = sections(doc)
    if isinstance(thing, type):
        assert fields(thing) <= found.get("Attributes", set()), f"{thing.__qualname__}: Attributes"
        for name, member in vars(thing).items():
            if isinstance(member, types.FunctionType) and not name.startswith("_"):
                assert member.__doc__, f"{thing.__qualname__}.{name} has no docstring"
        return
    parameters = {name for name in inspect.signature(thing).parameters if not name.startswith("_")}
    assert parameters == found.get("Args", set()), f"{thing.__qualname__}: Args"
    returns = inspect.signature(thing).return_annotation
    assert returns in ("None", None) or "Returns" in found, f"{thing.__qualname__}: Returns"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: run this test in a clone")
def test_the_tree_in_the_design_is_that_of_the_checkout():
    page = tree.PAGE.read_text(encoding="utf-8")
    assert tree.render(page) == page, "run `python -m scripts.tree`"
