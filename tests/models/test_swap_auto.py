"""What `auto` runs in a swapped timm model: the module's own attention where that is estimated to be faster."""

import re

import pytest
import timm
import torch

pytest.importorskip("timm")

import visattn
from tests.support.tiny_timm import make
from visattn.crossing import Crossing
from visattn.models.swap.sites import find_sites

# One for each way in which a module finds out about its own attention.
KINDS = [
    "caformer",
    "efficientformer",
    "gemma4",
    "diff",
    "diff_parallel",
    "parallel",
    "volo",
    "visformer",
    "fastvit",
    "levit",
    "shvit",
    "mobilenetv4",
    "pvt_v2",
    "iformer",
    "hiera",
    "sam2",
    "swinv2_cr",
]


@pytest.fixture
def dense_pays(monkeypatch):
    """As on a GPU where dense attention is the faster one."""
    asked, found = [], Crossing("triton", 0.105, 0.082, "eager")

    def crossing(problem):
        asked.append(problem)
        return found

    monkeypatch.setattr("visattn.runtime.verdict.crossing", crossing)
    monkeypatch.setattr("visattn.models.swap.runtime.crossing", crossing)
    monkeypatch.setattr("visattn.call_report.crossing", lambda problem: found)
    return asked


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_auto_keeps_what_is_dense_where_a_pattern_would_be_slower(family, dense_pays):
    model, x = make(family)
    stock = model(x)
    whole = {site.name.path for site in find_sites(model, "model") if not site.foreign and is_dense(site)}
    with visattn.apply(model, "na(window=2)") as handle:
        out, report = model(x), handle.report()
    for site in report.modules:
        engines = {call.backend for call in site.calls}
        assert (site.dense > 0 and not engines) or engines == {"stock"} if site.site in whole else not site.dense
        assert all("estimated 0.105 ms by triton, 0.082 ms dense" in why for why in site.kept)
        assert sum(site.kept.values()) == site.dense
    assert bool(whole) == (family != "swinv2_cr")
    if len(whole) == len(report.modules):
        assert torch.equal(out, stock)
    # It asks about the shapes that the pattern has where it runs.
    asked = {key(problem) for problem in dense_pays}
    with visattn.apply(model, "na(window=2)", always=True) as handle:
        model(x)
        calls = [call for site in handle.report().modules if site.site in whole for call in site.calls]
    assert asked == {key(call.problem) for call in calls if call.backend != "stock"}


def is_dense(site):
    return site.record.tokens or site.dense


def key(problem):
    return problem.layout.queries, problem.layout.keys, problem.batch, problem.heads, problem.dtype


@pytest.mark.parametrize("options", [{"always": True}, {"strict": True}, {"backend": "tiles"}])
@torch.no_grad()
def test_the_pattern_runs_where_it_must(options, dense_pays):
    model, x = make("caformer")
    with visattn.apply(model, "na(window=2)", **options) as handle:
        model(x)
    assert handle.report().sites_hit == len(handle.report().sites) and not dense_pays


def test_compiled_code_decides_for_few_and_many_samples(dense_pays):
    # A graph of an equal model, decided where nothing was dearer, would serve here too.
    torch._dynamo.reset()
    model, x = make("caformer")
    with torch.no_grad(), visattn.apply(model, "na(window=2)"):
        stock = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        asked = len(dense_pays)
        assert torch.allclose(compiled(x), stock, rtol=1e-4, atol=1e-5)
    assert {problem.batch for problem in dense_pays[asked:]} == {1, 64}
    assert {problem.mode for problem in dense_pays[asked:]} == {"compiled"}


@torch.no_grad()
def test_nothing_ran_says_so_once():
    model, x = make("caformer")
    with visattn.apply(model, "na(window=2)"):
        for module in model.modules():
            module.attn_drop = torch.nn.Dropout(0.5) if hasattr(module, "attn_drop") else None
        with pytest.warns(
            UserWarning, match="no attention module of MetaFormer ran its pattern: attention dropout 0.5"
        ):
            model.train()(x)


@pytest.mark.parametrize("pattern", ["na(window=2)", "na(window=-1)"])
@torch.no_grad()
def test_calls_that_8_bits_would_slow_down_are_exact_and_counted(pattern, monkeypatch):
    for place in ("runtime.verdict", "report"):
        monkeypatch.setattr(f"visattn.{place}.slower_in_8_bits", lambda problem: "why" if problem.precision else "")
    model, x = make("caformer")
    with visattn.apply(model, pattern):
        exact = model(x)
    with visattn.apply(model, pattern, precision="int8") as handle:
        assert torch.equal(model(x), exact)
    report = handle.report()
    assert report.exact == report.hits > 0 and not report.dense
    with visattn.apply(model, pattern, precision="int8", always=True) as handle:
        assert not torch.equal(model(x), exact)
    assert not handle.report().exact


@torch.no_grad()
def test_8_bits_beside_a_position_bias_are_refused_and_not_left_out():
    """Also where the class token is apart and the grid alone goes through the kernels."""
    model = timm.create_model("beit_base_patch16_224", img_size=64, depth=1, embed_dim=48, num_heads=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with (
        visattn.apply(model, "na(window=3)", backend="tiles", precision="int8"),
        pytest.raises(ValueError, match="in int8 it adds no relative position bias"),
    ):
        model(x)


@pytest.mark.crossing
@pytest.mark.parametrize("family", KINDS)
def test_on_a_cpu_too_small_maps_stay_dense_unless_gradients_flow(family):
    model, x = make(family)
    whole = [site for site in find_sites(model, "model") if not site.foreign and is_dense(site)]
    with torch.no_grad():
        stock = model(x)
        with visattn.apply(model, "na(window=2)") as handle:
            out, report = model(x), handle.report()
    assert all(
        re.match(r"estimated [\d.]+ ms by \w+, [\d.]+ ms dense on", why) for s in report.modules for why in s.kept
    )
    assert report.dense == report.kept and bool(whole) == (report.kept > 0)
    if len(whole) == len(report.modules) and not report.hits:
        assert torch.equal(out, stock)
    with visattn.apply(model, "na(window=2)") as handle:
        model(x)
    assert not handle.report().dense


@pytest.mark.crossing
@torch.no_grad()
def test_compiled_code_on_a_cpu_decides_alike():
    torch._dynamo.reset()
    model, x = make("caformer")
    stock = model(x)
    for options in ({}, {"always": True}):
        with visattn.apply(model, "na(window=2)", **options):
            out = torch.compile(model, backend="eager", fullgraph=True)(x)
        assert torch.allclose(out, stock, rtol=1e-4, atol=1e-5) == (not options)
        torch._dynamo.reset()
