"""What others add: a pattern by docs/extending.md in one file, plug-ins that are broken, names that are taken, undo."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import visattn
from tests.support.cases import layouts, qkv, tiles
from tests.support.oracles import dense_attention, mask_of, visited
from tests.support.plugins import Site, lines_of_code, page_code, page_points
from visattn import ops
from visattn.cli import app
from visattn.dispatch import BACKENDS, Backend, choose
from visattn.handle import ADAPTERS
from visattn.layout import Layout
from visattn.patterns import PATTERNS, Dense, Neighborhood, RuledPattern, parse
from visattn.patterns.registry import KINDS
from visattn.problem import Problem, Support
from visattn.registry import REGISTRY

LAYOUT = Layout((6, 7), 2, 1)
CROSS = page_code("class Cross")


def crossed(width):
    return lambda q, k: min(abs(q[0] - k[0]), abs(q[1] - k[1])) < width


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


@dataclasses.dataclass(frozen=True)
class Checker(RuledPattern):
    """Every other token."""

    period: int = 2
    name: ClassVar[str] = "checker"

    def check(self, grid):
        pass

    def sees(self, query, key):
        return (sum(query) - sum(key)) % self.period == 0


class Free(Backend):
    name = "free"

    def available(self):
        return Support(True)

    def supports(self, problem):
        return Support(True)

    def cost(self, problem):
        return 0.0

    def run(self, q, k, v, call):
        return torch.full_like(q, 7), None


def problem(text="na(window=3)"):
    return Problem(parse(text), LAYOUT, 1, 2, 2, 16, torch.float32, "cpu")


def refused(text, register, *args):
    before = REGISTRY.version
    with pytest.raises(ValueError, match=re.escape(text)):
        register(*args)
    assert REGISTRY.version == before


class TestAPatternInOneFile:
    """The file of docs/extending.md, installed with the entry point of the page; nobody registers anything."""

    @pytest.fixture(autouse=True)
    def _installed(self, site):
        site.install("cross", CROSS, page_points("visattn.patterns"))

    def test_it_is_short_and_has_a_name(self):
        assert lines_of_code(CROSS) < 60
        assert str(parse("cross(2)")) == "cross(width=2)" and parse("cross(2)") is parse("cross(2)")
        assert parse("sparselinear(sparse=cross(width=2))").sparse == parse("cross(2)")
        with pytest.raises(ValueError, match=r"width=0 must be a whole number"):
            parse("cross(0)")
        with pytest.raises(ValueError, match=r"did you mean 'cross'"):
            parse("crocs")

    @pytest.mark.parametrize("name", [name for name in BACKENDS.own if name != "flex"])
    def test_every_engine_for_lists_runs_it(self, name):
        q, k, v = qkv(LAYOUT, dtype=torch.float64 if name == "reference" else torch.float32, dim=16, grad=True)
        asked = dataclasses.replace(problem("cross(2)"), dtype=q.dtype, grad=True)
        backend = BACKENDS[name]
        if not backend.available().ok:
            pytest.skip(backend.available().reason)
        if not backend.supports(asked).ok:
            # Engines for patterns of their own, and none of those for lists.
            own = ("agent", "gate", "heads", "linear", "ordered", "sparse_linear", "sigmoid")
            own += ("clipped", "hybrid", "wrapped", "natten", "centroids", "sharing")
            assert name in own, backend.supports(asked).reason
            return
        out = visattn.attention(q, k, v, "cross(2)", LAYOUT, backend=name)
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        true = dense_attention(*wide, mask_of(crossed(2), LAYOUT), 0.25)
        assert (out - true).abs().max() < 2e-6
        ours, theirs = (torch.autograd.grad(o.square().sum(), i) for o, i in ((out, (q, k, v)), (true, wide)))
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, theirs, strict=True))

    def test_the_commands_know_it(self, tmp_path):
        done = CliRunner().invoke(app, ["simulate", "cross(2)", "--grid", "6x7", "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["density"] == pytest.approx(mask_of(crossed(2), Layout((6, 7))).double().mean())
        picture = tmp_path / "mask.png"
        done = CliRunner().invoke(app, ["show", "cross(2)", "--grid", "6x7", "--out", str(picture)])
        assert done.exit_code == 0 and picture.exists(), done.output
        with pytest.raises(ValueError, match=r"grid \(42,\) has 1 axes: pass \(height, width\)"):
            visattn.plan("cross(2)", Layout(42))

    def test_apply_knows_it_by_its_text(self):
        pytest.importorskip("timm")
        import timm

        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=2).eval()
        with torch.no_grad(), visattn.apply(model, "cross(1)", strict=True) as handle:
            model(torch.randn(1, 3, 64, 64))
            assert handle.report().sites_hit == 1


@given(layouts(dims=(2, 3)), st.integers(1, 4), st.data())
def test_tiles_of_a_rule_are_its_mask(layout, period, data):
    pattern = Checker(period)
    made = visattn.plan(pattern, layout, data.draw(tiles(layout.dims)))
    true = mask_of(lambda q, k: (sum(q) - sum(k)) % period == 0, layout)
    assert torch.equal(visited(made), true) and torch.equal(visattn.dense_mask(pattern, layout), true)
    assert made.visible == true.sum()
    pairs = pattern.tile_pairs(layout.grid, made.queries, made.keys)
    assert len(set(map(bytes, pairs.masks))) == len(pairs.masks) == pairs.mask.max(initial=-1) + 1


class TestBrokenPlugins:
    def test_the_others_stay_as_they_are(self, site):
        site.install("absent", "import no_such_module", {"visattn.patterns": {"absent": "absent:Absent"}})
        site.install("taken", CROSS, {"visattn.patterns": {"na": "taken:Cross"}})
        site.install("misnamed", CROSS, {"visattn.patterns": {"crux": "misnamed:Cross"}})
        site.install("leaves", "raise SystemExit", {"visattn.backends": {"leaves": "leaves:backend"}})
        site.install("odd", "family = attention = 3", {"visattn.families": {"OddModel": "odd:family"}})
        assert isinstance(parse("na(window=3)"), Neighborhood)
        with pytest.raises(ValueError, match=r"pattern 'absent' of package absent 1\.2 cannot be used: ModuleNotFound"):
            parse("absent")
        with pytest.raises(ValueError, match=r"crux.*Cross must have the name that it is registered by"):
            parse("crux")
        with pytest.warns(UserWarning, match=r"backend 'leaves' of package leaves 1\.2 cannot be used: SystemExit"):
            assert choose(problem("dense")).name == "sdpa"
        found = {plugin.name: plugin for plugin in visattn.plugins()}
        assert set(found) >= {"absent", "na", "crux", "leaves", "OddModel"}
        assert all(found[name].problem for name in ("absent", "crux", "leaves", "OddModel"))
        assert found["na"].problem == "pattern 'na' is that of visattn itself"
        assert "must be a visattn.pipelines.families.base.Family" in found["OddModel"].problem

    def test_a_repaired_one_works_and_a_removed_one_is_gone(self, site):
        site.install("mended", "raise ValueError('half written')", {"visattn.patterns": {"cross": "mended:Cross"}})
        with pytest.raises(ValueError, match="half written"):
            parse("cross")
        (site.folder / "mended.py").write_text(CROSS + "\n# Another size, for caches of bytecode.\n")
        assert [plugin.problem for plugin in visattn.plugins() if plugin.name == "cross"] == [""]
        assert str(parse("cross")) == "cross"
        (site.folder / "mended-1.2.dist-info" / "entry_points.txt").write_text("")
        visattn.plugins()
        with pytest.raises(ValueError, match="unknown pattern 'cross'"):
            parse("cross")

    def test_a_name_that_two_packages_claim_is_nobodys(self, site):
        for name in ("one", "two"):
            site.install(name, CROSS, {"visattn.patterns": {"cross": f"{name}:Cross"}})
        with pytest.raises(ValueError, match=r"package \w+ 1\.2 and package \w+ 1\.2 .*both claim the name"):
            parse("cross")

    def test_a_package_may_also_register_what_its_entry_points_name(self, site):
        code = CROSS + "\nimport visattn\n\nvisattn.register_pattern(Cross)\n"
        site.install("cross", code, page_points("visattn.patterns"))
        assert str(parse("cross(3)")) == "cross(width=3)"
        sys.modules["cross"].Cross  # noqa: B018
        visattn.register_pattern(sys.modules["cross"].Cross).remove()

    def test_importing_visattn_imports_no_plugin_and_the_doctor_names_them(self, site):
        site.install("cross", CROSS, page_points("visattn.patterns"))
        site.install("absent", "import no_such_module", {"visattn.patterns": {"absent": "absent:Absent"}})
        code = (
            "import sys, json, visattn; loaded = sorted({'torch', 'cross'} & set(sys.modules));"
            "from visattn.patterns import parse; text = str(parse('cross(2)'));"
            "print(json.dumps([loaded, text, [p[1::2] for p in visattn.plugins()]]))"
        )
        path = os.pathsep.join([str(site.folder), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        loaded, text, found = json.loads(done.stdout)
        assert (loaded, text) == ([], "cross(width=2)")
        assert dict(found) == {"cross": "", "absent": "ModuleNotFoundError: No module named 'no_such_module'"}


class TestRegistrations:
    def test_undo_leaves_nothing(self):
        with visattn.register_pattern(Checker) as made:
            assert parse("checker(3)") == Checker(3)
        with pytest.raises(ValueError, match="unknown pattern 'checker'"):
            parse("checker(3)")
        made.remove()
        with visattn.register_pattern(Checker), visattn.register_pattern(Checker):
            assert parse("checker(3)") == Checker(3)

    def test_a_class_defined_again_replaces_the_old_one(self):
        again = dataclasses.dataclass(frozen=True)(
            type("Checker", (Checker,), {"name": "checker", "__module__": __name__, "period": 5})
        )
        with visattn.register_pattern(Checker) as old:
            assert type(parse("checker")) is Checker
            with visattn.register_pattern(again):
                assert type(parse("checker")) is again
                old.remove()
                assert type(parse("checker")) is again

    def test_compiled_code_runs_a_class_defined_again(self):
        more = {
            "name": "checker",
            "__module__": __name__,
            "sees": lambda self, query, key: (sum(query) - sum(key)) % 3 == 0,
        }
        again = dataclasses.dataclass(frozen=True)(type("Checker", (Checker,), more))
        q, k, v = qkv(LAYOUT, dtype=torch.float32, dim=16)
        run = torch.compile(lambda q, k, v: visattn.attention(q, k, v, "checker", LAYOUT), backend="eager")
        with visattn.register_pattern(Checker):
            first = run(q, k, v)
            assert torch.equal(first, visattn.attention(q, k, v, "checker", LAYOUT))
            with visattn.register_pattern(again):
                second = run(q, k, v)
                assert torch.equal(second, visattn.attention(q, k, v, "checker", LAYOUT))
        assert not torch.equal(first, second)

    def test_what_is_no_pattern_or_has_a_name_that_is_taken(self):
        refused("pattern 'dense' is that of visattn itself", visattn.register_pattern, Dense)
        other = dataclasses.dataclass(frozen=True)(type("Other", (Checker,), {"name": "checker"}))
        with visattn.register_pattern(Checker):
            refused("is that of register_pattern in tests.core.test_doors: take", visattn.register_pattern, other)
        refused("must be a class derived from visattn.patterns.Pattern", visattn.register_pattern, Free)
        refused("must have the name", visattn.register_pattern, type("Checked", (Checker,), {}))
        thawed = type("Thawed", (RuledPattern,), {"name": "thawed"})
        refused("Thawed must be a frozen dataclass", visattn.register_pattern, thawed)
        half = dataclasses.dataclass(frozen=True)(type("Half", (RuledPattern,), {"name": "half"}))
        refused("Half must define check, sees", visattn.register_pattern, half)

    def test_a_backend_takes_part_in_auto_until_it_is_removed(self):
        q = torch.zeros(1, LAYOUT.length, 2, 16)
        before = choose(problem()).name
        with visattn.register_backend(Free()):
            assert (visattn.attention(q, q, q, "na(window=3)", LAYOUT) == 7).all()
            assert visattn.backends()["free"].ok and "\n  free" in str(visattn.explain("dense", LAYOUT, q))
        assert choose(problem()).name == before and not visattn.attention(q, q, q, "na(window=3)", LAYOUT).any()
        with pytest.raises(ValueError, match="unknown backend 'free'"):
            visattn.attention(q, q, q, "na(window=3)", LAYOUT, backend="free")
        refused("backend 'sdpa' is that of visattn itself", visattn.register_backend, BACKENDS["sdpa"])
        refused("must be an object of a subclass", visattn.register_backend, Free)

    def test_a_backend_that_adds_in_any_order_is_left_out_once_torch_is_to_be_deterministic(self):
        class Atomic(Free):
            def supports(self, problem):
                return Support(not problem.strict, "it adds in any order")

        q = torch.zeros(1, LAYOUT.length, 2, 16)
        with visattn.register_backend(Atomic()):
            assert (visattn.attention(q, q, q, "na(window=3)", LAYOUT) == 7).all()
            torch.use_deterministic_algorithms(True)
            try:
                assert not visattn.attention(q, q, q, "na(window=3)", LAYOUT).any()
                with pytest.raises(ValueError, match="it adds in any order"):
                    visattn.attention(q, q, q, "na(window=3)", LAYOUT, backend="free")
                torch.use_deterministic_algorithms(True, warn_only=True)
                assert (visattn.attention(q, q, q, "na(window=3)", LAYOUT) == 7).all()
            finally:
                torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("asked", ["available", "supports", "cost"])
    def test_a_backend_that_fails_to_answer_is_left_out(self, asked):
        def fail(*_):
            raise KeyError("sm_900")

        with visattn.register_backend(type("Failing", (Free,), {asked: fail})()):
            with pytest.warns(UserWarning, match="backend 'free' is left out: .*KeyError: 'sm_900'"):
                assert choose(problem("dense")).name == "sdpa"
            with (
                pytest.warns(UserWarning),
                pytest.raises(ValueError, match="backend 'free' cannot run this call: it f"),
            ):
                choose(problem("dense"), "free")

    def test_families(self):
        from visattn.pipelines.families import FAMILIES, find_family

        dit = FAMILIES["DiTTransformer2DModel"]
        own = dataclasses.replace(dit, name="Mosaic", classes=("MosaicModel", "MosaicVideoModel"))
        base = type("DiTTransformer2DModel", (torch.nn.Module,), {})
        derived = type("MosaicModel", (base,), {})
        with visattn.register_family(own):
            assert find_family(derived()) is own and find_family(base()) is dit
            refused(
                "family 'MosaicModel' is that of register", visattn.register_family, dataclasses.replace(own, dims=3)
            )
        assert find_family(derived()) is dit
        half = dataclasses.replace(own, classes=("MosaicModel", "FluxTransformer2DModel"))
        refused("'FluxTransformer2DModel' is that of visattn itself", visattn.register_family, half)
        assert "MosaicModel" not in FAMILIES
        refused("must be a visattn.pipelines.families.base.Family", visattn.register_family, 3)

    def test_attention_of_timm(self):
        pytest.importorskip("timm")
        from visattn.models.swap.records import RECORDS, record_of

        record = dataclasses.replace(RECORDS["timm.layers.attention.Attention"], models="mine")
        kind = type("Mine", (torch.nn.Module,), {"__module__": "mine"})
        with visattn.register_attention(kind, record), visattn.register_attention("mine.later.Mine", record):
            assert record_of(kind()) is record and "mine.later.Mine" in RECORDS
        assert record_of(kind()) is None
        refused("must be a visattn.models.swap.records.Record", visattn.register_attention, kind, Free)
        refused("must be module and name of the class", visattn.register_attention, "Mine", record)

    def test_an_adapter_patches_the_models_of_its_library(self):
        model = type("Model", (), {"__module__": "somelib.models"})()
        asked = []

        def install(target, request):
            asked.append((target, request.backend))
            return []

        with pytest.raises(ValueError, match=r"cannot apply to a somelib\.models\.Model"):
            visattn.apply(model, "dense")
        with visattn.register_adapter("somelib", install):
            visattn.apply(model, "dense").remove()
        assert asked == [(model, "auto")] and list(ADAPTERS) == list(ADAPTERS.own)
        refused("adapter 'timm' is that of visattn itself", visattn.register_adapter, "timm", install)

    def test_threads(self):
        kinds = [dataclasses.dataclass(frozen=True)(type(f"T{i}", (Checker,), {"name": f"t{i}"})) for i in range(8)]
        wrong = []

        def work(kind):
            for _ in range(50):
                with visattn.register_pattern(kind):
                    if type(parse(kind.name)) is not kind:
                        wrong.append(kind)
                if kind.name in KINDS:
                    wrong.append(kind)

        threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_compiled_code_refuses_a_pattern_that_its_text_does_not_find(self):
        with pytest.raises(ValueError, match="unknown pattern 'checker'"):
            ops._text(Checker())
        other = dataclasses.dataclass(frozen=True)(
            type("Other", (Checker,), {"name": "dense", "__str__": lambda _: "dense"})
        )
        with pytest.raises(ValueError, match="'dense' is another pattern than this Other: register_pattern it"):
            ops._text(other())


def test_our_own_are_declared_in_the_same_tables():
    assert [KINDS[name] for name in KINDS.own] == list(PATTERNS)
    assert [BACKENDS[name].name for name in BACKENDS.own] == list(BACKENDS.own)
    assert ADAPTERS.own == ("diffusers", "timm", "transformers")
