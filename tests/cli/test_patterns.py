"""The command that lists patterns, and what the others say of patterns that look at q and k."""

import json

from typer.testing import CliRunner

from visattn.cli import app
from visattn.patterns import PATTERNS
from visattn.patterns.presets import PRESETS


def call(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_patterns_lists_every_pattern_and_the_names_that_stand_for_one():
    text, found = call("patterns"), json.loads(call("patterns", "--json"))
    assert set(found["patterns"]) == {kind.name for kind in PATTERNS}
    assert found["presets"] == {name: preset._asdict() for name, preset in PRESETS.items()}
    for name, preset in PRESETS.items():
        assert f"{name:<14}{preset.pattern}" in text and preset.source in text and preset.differs in text


def test_simulate_says_what_depends_on_q_and_k():
    for pattern, note in (
        ("topk(keep=0.25)", "which blocks are listed depends on q and k, head by head; how many does not"),
        ("nabla", "which blocks are listed, and how many, depends on q and k, head by head"),
    ):
        assert note in call("simulate", pattern, "--grid", "8x16x16")
    found = json.loads(call("simulate", "topk(keep=0.25)", "--grid", "32x32", "--json"))
    assert found["density"] == 0.25 and found["visited"] == 64
    assert "note" not in call("simulate", "na(window=3)", "--grid", "8x8")


def test_show_draws_an_example(tmp_path):
    out = tmp_path / "mask.png"
    call("show", "topp(p=0.5, block=4x4, rest=mean)", "--grid", "16x16", "--prefix", "3", "--out", out)
    assert out.stat().st_size > 1000
