"""A canary over the installed transformers: the classes and arguments that records name are there."""

import ast
import importlib.util
from functools import cache

import pytest

pytest.importorskip("transformers")

import transformers

from visattn.clients.transformers import grids
from visattn.clients.transformers.records import RECORDS

# Arguments that a reader takes from the forward of an anchor, one of them at least.
READ = {
    grids.image: {"pixel_values"},
    grids.video: {"pixel_values", "pixel_values_videos"},
    grids.shapes: {"spatial_shapes"},
    grids.frames: {"grid_thw"},
    grids.each_frame: {"pixel_values"},
    grids.pooled: {"pixel_values"},
    grids.elsewhere: set(),
}
TOLD = {grids.of_map: {"hidden_states"}, grids.of_sides: {"height", "width"}, grids.of_dimensions: {"input_dimensions"}}


@cache
def classes(folder):
    """Arguments of the forward of every class in a folder, read without importing it."""
    home = importlib.util.find_spec("transformers").submodule_search_locations[0]
    with open(f"{home}/models/{folder}/modeling_{folder}.py", encoding="utf-8") as file:
        found = {node.name: node for node in ast.parse(file.read()).body if isinstance(node, ast.ClassDef)}
    return {name: arguments(node, found) for name, node in found.items()}


def arguments(node, found):
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "forward":
            return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in found]
    return arguments(found[bases[0]], found) if bases else set()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.anchor)
def test_what_a_record_names_is_there(record):
    version = f"transformers {transformers.__version__}"
    known = classes(record.folder)
    anchor = record.anchor.partition(".")[2]
    for name in (anchor, *record.attention):
        assert name in known, f"{version} has no {name} in models/{record.folder}: its record needs the new name"
    wanted = READ[record.reader]
    assert not wanted or wanted & known[anchor], f"{version}: the forward of {anchor} takes none of {wanted}"
    for name in record.attention if record.told else ():
        missing = TOLD[record.told] - known[name]
        assert not missing, f"{version}: the forward of {name} does not tell {missing}"


def test_the_tables_of_functions_and_masks_are_there():
    from transformers import masking_utils, modeling_utils

    version = f"transformers {transformers.__version__}"
    for room, name in ((modeling_utils, "AttentionInterface"), (masking_utils, "AttentionMaskInterface")):
        assert callable(getattr(getattr(room, name, None), "register", None)), f"{version} has no {name}.register"
