"""What a report prints: modules that did the same once, reasons once, what is unusual never left out."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visattn.folded import folded
from visattn.layout import Layout
from visattn.patterns import parse
from visattn.problem import Problem
from visattn.reached import Reached
from visattn.report import CallReport, Report, SiteReport
from visattn.report_text import WIDTH, mean_density, named

PATTERN = "na(window=9x9)"
REFUSED = {
    "triton": "there is no CUDA device, and a sentence that is long enough to be wrapped where a terminal ends",
    "natten": "natten is not installed",
}


def call(grid=(32, 32), hits=2, **more):
    problem = Problem(parse(PATTERN), Layout(grid, suffix=77), 1, 4, 4, 64, torch.float32, "cpu")
    made = CallReport(problem, hits, "tiles", f"cheapest: {grid[0] / 100} of dense (estimate)", REFUSED, 0.125)
    return replace(made, **more)


def site(name, *calls, model="transformer", **more):
    made = SiteReport(model, name, parse(PATTERN), calls or (call(),), 0, {}, 0.5, 0.25, called=2)
    return replace(made, **more)


def flux(**changed):
    """A report of 19 and 38 modules; those that are named have changes."""
    names = [f"transformer_blocks.{i}.attn" for i in range(19)]
    names += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
    return Report(tuple(site(name, **changed.get(name, {})) for name in names))


def flat(report):
    """The text without its lines."""
    return " ".join(str(report).split())


def expanded(text):
    """The names that a folded one stands for."""
    parts = []
    for part in text.split("."):
        numbers = re.fullmatch(r"[\d,-]+", part) and part != "07"
        runs = [run.partition("-") for run in part.split(",")] if numbers else None
        parts.append([part] if runs is None else [str(n) for a, _, b in runs for n in range(int(a), int(b or a) + 1)])
    return [".".join(each) for each in itertools.product(*parts)]


name = st.tuples(st.sampled_from(["blocks", "up"]), st.integers(0, 5), st.sampled_from(["attn1", "attn2", "07"]))


@given(st.lists(st.one_of(name, st.tuples(name, st.integers(0, 11))), unique=True))
def test_folded_names_stand_for_each_name_once_and_no_other(drawn):
    def written(parts):
        return ".".join(written(part) if isinstance(part, tuple) else str(part) for part in parts)

    names = [written(parts) for parts in drawn]
    found = folded(names)
    assert sorted(each for text, _ in found for each in expanded(text)) == sorted(names)
    assert all(len(expanded(text)) == count for text, count in found)


def test_modules_of_a_unet_are_ranges():
    levels = {"down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10), "up_blocks.0": (3, 10)}
    names = [
        f"{level}.attentions.{i}.transformer_blocks.{j}.attn1"
        for level, (outer, inner) in levels.items()
        for i in range(outer)
        for j in range(inner)
    ]
    assert folded(names) == [
        ("down_blocks.1.attentions.0-1.transformer_blocks.0-1.attn1", 4),
        ("down_blocks.2.attentions.0-1.transformer_blocks.0-9.attn1", 20),
        ("mid_block.attentions.0.transformer_blocks.0-9.attn1", 10),
        ("up_blocks.0.attentions.0-2.transformer_blocks.0-9.attn1", 30),
    ]


def test_a_large_model_is_a_page_with_each_reason_once():
    text = str(flux())
    assert "57 of 57 attention modules ran a pattern: 114 calls, density 0.125" in text
    assert "transformer_blocks.0-18.attn (19)" in text and "single_transformer_blocks.0-37.attn (38)" in text
    assert text.count("2 hits each, tiles on 32x32, suffix 77, density 0.125\n") == 1
    assert text.count("cheapest: 0.32 of dense (estimate)") == 1
    assert "!" not in text and len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) <= WIDTH
    for backend in ("triton", "natten"):
        assert flat(flux()).count(f"{backend}: {REFUSED[backend]}") == 1


def test_what_is_unusual_stands_alone_and_is_marked():
    changed = {
        "transformer_blocks.3.attn": {"calls": (), "fallbacks": {"a mask that is more than padding": 2}},
        "transformer_blocks.4.attn": {"calls": (), "dense": 2, "kept": {"estimated 2 ms by tiles, 1 ms dense": 1}},
        "single_transformer_blocks.9.attn": {"calls": ()},
    }
    report = flux(**changed)
    lines = str(report).splitlines()
    marked = [line for line in lines if line.startswith("!")]
    assert [" ".join(line.split()) for line in marked] == [
        "! 2 calls fell back to dense: a mask that is more than padding",
        "! 1 call kept dense: estimated 2 ms by tiles, 1 ms dense",
        "! not called, unlike others",
    ]
    for line, name in zip(marked, changed, strict=True):
        above = lines[: lines.index(line)]
        assert any(each.split()[0] == name for each in above[-2:])
    assert "transformer_blocks.0-2,5-18.attn (17)" in flat(report)
    assert "single_transformer_blocks.0-8,10-37.attn (37)" in flat(report)
    assert "and 2 fallback calls" in lines[1]


def test_before_a_run_nothing_is_unusual():
    assert "!" not in str(Report((site("a.0", calls=()), site("a.1", calls=()))))


@pytest.mark.parametrize(
    "change",
    [
        {"dense": 1},
        {"model": "other"},
        {"pattern": parse("na(window=3x3)")},
        {"calls": (call((16, 16)),)},
        {"calls": (call(hits=3),)},
        {"calls": (call(), call((16, 16)))},
        {"calls": (call(backend="sdpa"),)},
        {"calls": (call(density=0.5),)},
        {"fallbacks": {"why": 1}},
        {"kept": {"why": 1}},
        {"exact": {"why": 1}},
    ],
)
def test_modules_that_differ_are_apart(change):
    sites = [site("a.0").to_dict(), site("a.1", **change).to_dict()]
    assert len(named(sites)) == 2
    assert str(Report((site("a.0"), site("a.1", **change)))).count("a.0-1") == 0


def test_modules_of_several_models_tell_them():
    report = Report((site("blocks.0.attn"), site("blocks.0.attn", model="transformer_2")))
    assert "transformer: blocks.0.attn" in str(report) and "transformer_2: blocks.0.attn" in str(report)


def test_measured_shares_are_joined():
    shares = [(0.2, 0.1, 0.3), (0.4, 0.15, 0.6)]
    sites = [
        site(f"a.{i}", call(density=mean, reached=Reached(mean, least, most)), caught=Reached(mean, least, most))
        for i, (mean, least, most) in enumerate(shares)
    ]
    text = flat(Report(tuple(sites)))
    assert "density 0.300 (0.100 to 0.600 over heads and calls)" in text
    assert "0.300 of the attention caught (0.100 at least), least in a.0 with 0.200" in text
    assert mean_density([each.to_dict() for each in sites]) == pytest.approx(0.3)


def test_all_kinds_of_calls_are_listed_or_counted():
    calls = [call((n, n), hits=n) for n in range(20, 3, -1)]
    text = str(Report((site("a.0", *calls[:3]),)))
    assert all(f"{c.hits} hits, tiles on {c.problem.layout}" in text for c in calls[:3])
    assert "and 13 more kinds of calls, see to_dict()" in str(Report((site("a.0", *calls),)))


def test_lines_fit_a_terminal_where_names_do():
    reason = "a reason of many words " * 20
    named_so = site("a" * 150, calls=(), fallbacks={reason: 1})
    lines = str(Report((site("b.0"), named_so), schedule="a preset " * 40)).splitlines()
    assert all(len(line) <= WIDTH for line in lines if "aaa" not in line)
    assert flat(Report((named_so,))).count(reason.strip()) == 1


def test_a_pattern_that_is_slower_than_dense_attention_is_marked():
    """Masked dense attention on few tokens is the cheapest engine for a window, and still not worth it."""
    posed = (1, 4, 4, 64, torch.float32, "cpu")
    few = CallReport.of(Problem(parse("na(window=5x5)"), Layout((12, 12)), *posed), 2, "auto")
    many = CallReport.of(Problem(parse(PATTERN), Layout((64, 64)), *posed), 2, "auto")
    assert few.slower and few.why.endswith("(estimate), slower than dense attention")
    assert not many.slower and many.why.endswith("(estimate)")
    for calls in ((few,), (few, many)):
        lines = str(Report((site("a.0", *calls),))).splitlines()
        assert [line.startswith("!") for line in lines].count(True) == 1
    assert not CallReport.of(few.problem, 2, "tiles").slower
