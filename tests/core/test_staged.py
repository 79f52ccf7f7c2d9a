"""Patterns by layer and step: texts, overlaps, scaling, files."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visattn import parse
from visattn.scaling import scaled
from visattn.schedule import Schedule
from visattn.selectors import SiteName
from visattn.staged import Span, Staged
from visattn.tuned import Tuned

NA, CLEAR = "na(window=3x3)", "clear(radius=2)"
SITES = [SiteName(f"blocks.{i}.attn", f"blocks.{i}") for i in range(3)]


class TestSteps:
    @given(st.integers(1, 60), st.lists(st.integers(0, 20), max_size=5, unique=True))
    def test_shares_give_every_step_of_any_run_one_stage(self, total, cuts):
        edges = [0.0, *sorted(c / 20 for c in cuts if 0 < c < 20), 1.0]
        staged = Staged.of({f"{a}-{b}": NA for a, b in itertools.pairwise(edges)})
        found = [staged.index(step, total) for step in range(total)]
        assert found == sorted(found) and min(found) >= 0
        assert [sum(stage.has(step, total) for stage in staged.stages) for step in range(total)] == [1] * total

    def test_counts_include_their_last_step_and_unnamed_steps_are_dense(self):
        staged = Staged.of({"1-2": NA, "4-": CLEAR})
        assert [staged.index(step, None) for step in range(6)] == [-1, 0, 0, -1, 1, 1]
        assert str(staged.at(0, None, (8, 8))) == "dense"
        assert str(staged) == f"{{1-2: {NA}, 4-: {CLEAR}}}"

    @pytest.mark.parametrize(
        ("stages", "why"),
        [
            ({"0-3": NA, "2-": CLEAR}, "overlap"),
            ({"0-3": NA, "0.5-": CLEAR}, "all be counts or all shares"),
            ({"4-3": NA}, "end must be behind"),
            ({"0.5-1.5": NA}, "share at most 1"),
            ({"first": NA}, "must be counts like"),
            ({"0-3": "linear(feature=hedgehog)"}, "pattern of all steps"),
            ({}, "names no steps"),
            ({"0-3": "dense in fp8"}, "a window of the whole grid"),
            ({"0-3": "linear in int8"}, "8 bits are for patterns that list"),
            ({"0-3": f"{NA} in fp4"}, "fp4"),
        ],
    )
    def test_what_means_nothing_is_refused(self, stages, why):
        with pytest.raises(ValueError, match=why):
            Staged.of(stages)

    def test_stages_say_what_they_are_computed_in(self):
        staged = Staged.of({"0-1": f"{NA} in int8", "2-": NA})
        assert [stage.precision for stage in staged.stages] == ["int8", None] and staged.precision == "int8"
        assert str(staged) == f"{{0-1: {NA} in int8, 2-: {NA}}}" and str(Staged.of(f"{NA} in fp8")) == f"{NA} in fp8"
        assert staged != Staged.of({"0-1": NA, "2-": NA})
        # Patterns with two branches run one of them along lists.
        assert str(Staged.of("sla(keep=0.05) in fp8")) == "sla in fp8"
        schedule = Schedule.of({"0": f"{NA} in fp8", "1": {"0-": f"{NA} in int8"}, "2": CLEAR})
        assert schedule.precisions(SITES, "Net") == ["fp8", "int8", None] and schedule.any_precision == "fp8"
        assert [str(p) for p in schedule.assign_stepless(SITES, "Net")] == [NA, NA, CLEAR]
        with pytest.raises(ValueError, match="precision='int8' and a schedule whose own patterns are in fp8"):
            Schedule.of({"0-": f"{NA} in fp8"}, precision="int8")

    def test_schedules_know_whether_they_need_steps(self):
        assert not Schedule.of({"0-": NA}).needs_steps
        schedule = Schedule.of({"0-1": {"0-0.5": NA}, "2-": CLEAR})
        assert schedule.needs_steps and [str(p) for p in schedule.patterns] == [NA, CLEAR]
        with pytest.raises(ValueError, match="needs the number of steps"):
            schedule.stage(1, None, (8, 8))
        with pytest.raises(ValueError, match="has none"):
            schedule.assign_stepless(SITES, "VisionTransformer")

    def test_runs_that_it_is_not_for_have_something_else(self):
        careful = Staged.of(CLEAR)
        wide = replace(Staged.of({"0-0.5": "topk"}), span=Span((4, 4), (16, 16), (8, 24)), otherwise=careful)
        narrow = replace(Staged.of({"0-": f"{NA} in fp8"}), span=Span((8, 8), (8, 8), (12, 12)), otherwise=wide)
        found = {run: narrow.choice(*run) for run in [(12, (8, 8)), (8, (8, 8)), (9, (4, 16)), (12, (4, 4, 4))]}
        assert list(found.values()) == [0, 1, 1, 2] and narrow.choice(None, (8, 8)) == narrow.choice(12, ()) == 2
        assert [str(narrow.at(step, 8, (4, 4))) for step in (3, 4)] == ["topk", "dense"]
        assert [str(pattern) for pattern in narrow.patterns] == [NA, "topk", CLEAR] and narrow.precision == "fp8"
        assert not narrow.constant and careful.constant
        assert str(narrow) == (
            f"{NA} in fp8 on grid 8x8 with 12 steps, else {{0-0.5: topk}} on grids 4x4 to 16x16 with 8 to 24 steps, "
            f"else {CLEAR}"
        )
        schedule = Schedule(((None, narrow),))
        assert schedule.stage(5, 8, (8, 8)) == ((1, -1),) and schedule.stage(None, None, (8, 8)) == ((2, 0),)
        with pytest.raises(ValueError, match="needs the step"):
            schedule.stage(None, 8, (8, 8))
        with pytest.raises(ValueError, match="goes by denoising steps"):
            schedule.assign_stepless(SITES, "VisionTransformer")

    def test_what_keeps_something_is_that_of_the_run(self):
        kept = replace(Staged.of("topk(every=2)"), span=Span((8, 8), (8, 8), (2, 9)), otherwise=Staged.of(NA))
        schedule = Schedule((((slice(0, 1),), parse(NA)), ((slice(1, 2),), kept)))
        assert schedule.keeps is schedule.keeps_on(2, (8, 8)) and schedule.keeps_on(2, (9, 9)) is None

    @pytest.mark.parametrize("given", ["0-3", "1-99", "2-3"])
    def test_ranges_that_end_behind_the_last_layer_are_refused(self, given):
        first, last = given.split("-")
        said = f"layers: '{given}' ends at layer {last}, and Net has 3 layers, 0 to 2: write '{first}-' for all layers"
        with pytest.raises(ValueError, match=said):
            Schedule.of({given: NA}).assign(SITES, "Net")
        with pytest.raises(ValueError, match=said):
            Schedule.of(NA, precision="fp8", precise_layers=given).precisions(SITES, "Net")
        assert Schedule.of({f"{first}-": NA}).assign(SITES, "Net")[2] == parse(NA)
        with pytest.raises(ValueError, match="selects nothing in Net; its 3 layers"):
            Schedule.of({"3-5": NA}).assign(SITES, "Net")

    def test_what_counts_more_steps_than_a_run_has(self):
        schedule = Schedule.of({"0": {"0-3": NA, "4-99": CLEAR}, "1": {"30-": NA}, "2": {"0.5-": NA}}, dense_steps=25)
        assert schedule.beyond(20) == ["steps 4-99", "steps 30-", "dense_steps=25"]
        assert schedule.beyond(25) == ["steps 4-99", "steps 30-"] and schedule.beyond(100) == []
        assert Schedule.of({"0-": NA}, dense_steps=0.5, dense_last_steps=3).beyond(3) == []


class TestScaling:
    @pytest.mark.parametrize(
        ("pattern", "other", "expected"),
        [
            ("na(window=7x9)", (32, 64), "na(window=15x37)"),
            ("na(window=16x16, stride=8x8)", (24, 16), "na(window=24x16, stride=8)"),
            ("na(window=3x3, dilation=4)", (32, 32), "na(window=7x7, dilation=4)"),
            ("halo(block=8x8, halo=3)", (32, 16), "halo(block=8x8, halo=6x3)"),
            ("clear(radius=4)", (32, 32), "clear(radius=8)"),
            ("topk(keep=0.25)", (32, 32), "topk(keep=0.25)"),
            ("perhead(heads={0: na(window=3x3)}, rest=dense)", (32, 32), "perhead(heads={0: na(window=7x7)})"),
        ],
    )
    def test_by_rule(self, pattern, other, expected):
        grid = (16, 16)
        assert str(scaled(parse(pattern), grid, other)) == str(parse(expected))
        assert scaled(parse(pattern), grid, grid) == parse(pattern)

    @given(st.integers(1, 40), st.integers(1, 8), st.integers(8, 40), st.integers(8, 90))
    def test_windows_stay_defined_and_keep_their_share(self, window, stride, n, m):
        stride = min(stride, window)
        made = scaled(parse(f"na(window=({window},), stride={stride})"), (n,), (m,))
        made.check((m,))
        (wide, *_), (before, *_) = made.axes((m,))[0], parse(f"na(window=({window},), stride={stride})").axes((n,))[0]
        assert min(m, before * m / n) - 1e-6 <= wide <= before * m / n + max(stride, 2)

    def test_other_axes_are_refused(self):
        with pytest.raises(ValueError, match="other axes"):
            scaled(parse(NA), (8, 8), (2, 8, 8))


def tuned(**more):
    layers = {"0": {"0-0.5": "dense", "0.5-1": NA}, "1": {"0-1": CLEAR}, "2": {"0-0.5": "dense", "0.5-1": NA}}
    return Tuned("Net", 3, (16, 16), layers, **more)


class TestFile:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "tuned.json"
        tuned(settings={"psnr": 30.0}, verified={"worst": 31.5}).write(path)
        assert Tuned.read(path) == tuned(settings={"psnr": 30.0}, verified={"worst": 31.5})
        schedule = Schedule.of(str(path))
        one, two, three = schedule.assign(SITES, "Net")
        assert one is three and str(one.at(3, 4, (32, 32))) == "na(window=7x7)"
        assert str(two.at(0, 4, (16, 16))) == CLEAR

    def test_it_is_for_its_model(self, tmp_path):
        schedule = Schedule.tuned(tuned())
        for sites, model in ((SITES, "OtherNet"), (SITES[:2], "Net")):
            with pytest.raises(ValueError, match="tuned for Net with 3 layers"):
                schedule.assign(sites, model)

    def test_grids_far_away_are_warned_of(self):
        staged = Schedule.tuned(tuned()).staged[0]
        with pytest.warns(UserWarning, match="grid 64x64 is far from 16x16"):
            assert str(staged.at(3, 4, (64, 64))) == "na(window=13x13)"

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"visattn_schedule": 2}, "another version"),
            ({"grid": "16x16"}, "grid"),
            ({"model": {"class": "Net"}}, "model"),
            ({"surprise": 1}, "unknown field surprise"),
            ({"layers": {"0": {"0-1": "na(windo=3)"}}}, "no parameter 'windo'"),
            ({"layers": {"0": {"0-1": "na(window=3x3x3)"}}}, "3"),
            ({"layers": {"0": NA}}, "layers"),
            ({"scales": [1]}, "scales"),
        ],
    )
    def test_what_is_no_such_file_says_why(self, tmp_path, change, why):
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(tuned().to_dict() | change))
        with pytest.raises(ValueError, match=why):
            Tuned.read(path)
