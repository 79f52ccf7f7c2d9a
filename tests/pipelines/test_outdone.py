"""Lists that q and k make so long that dense attention is faster: the model's own attention runs, and that counts."""

import re

import pytest
import timm
import torch

import visattn
from tests.support import tiny_models
from visattn import dispatch
from visattn.crossing import Crossing

# Noise lists nearly everything, and a block each.
LONG, SHORT = "topp(p=0.9, block=2x2)", "topp(p=0.001, most=1, always=none, block=2x2)"


@pytest.fixture
def long_lists_lose(monkeypatch):
    """As where dense attention is faster than lists of more than half of the keys, of which a quarter is expected."""
    asked = []

    def crossing(problem):
        asked.append(problem)
        listed = 0.25 if problem.listed is None else problem.listed
        return Crossing("tiles", 2 * listed, 1.0, "eager", device="cpu", listed=problem.listed)

    for place in ("runtime.verdict", "models.swap.runtime", "call_report"):
        monkeypatch.setattr(f"visattn.{place}.crossing", crossing)
    # Grids this small would run under a mask.
    monkeypatch.setattr("visattn.kernels.sdpa.MASKED", {"cpu": 1e6})
    dispatch._choose.cache_clear()
    yield asked
    dispatch._choose.cache_clear()


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2).eval()
    return model, (torch.randn(2, 3, 96, 96),)


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else tiny_models.run(model, inputs)


@pytest.mark.parametrize("make", [vit, tiny_models.flux])
@pytest.mark.filterwarnings("ignore:no attention module:UserWarning")
def test_calls_whose_lists_came_out_long_are_left_dense_and_counted(make, long_lists_lose):
    model, inputs = make()
    stock = run(model, inputs)
    with visattn.apply(model, LONG) as handle:
        # As they are decided, and as calls like those.
        for _ in range(3):
            assert torch.equal(run(model, inputs), stock)
        report = handle.report()
    sites = len(report.modules)
    assert (report.hits, report.dense, report.kept, report.fallbacks) == (0, 3 * sites, 3 * sites, {})
    found = r"estimated [\d.]+ ms by tiles, 1\.000 ms dense, for up to (0\.[5-9]\d|1\.00) of the keys are listed on"
    assert all(re.match(found, why) for site in report.modules for why in site.kept)
    assert "of the keys are" in str(report)


@pytest.mark.parametrize("make", [vit, tiny_models.flux])
def test_lists_of_no_more_than_expected_run(make, long_lists_lose):
    model, inputs = make()
    with visattn.apply(model, SHORT) as handle:
        outs = [run(model, inputs) for _ in range(2)]
        report = handle.report()
    assert report.kept == 0 and report.hits == 2 * len(report.modules)
    with visattn.apply(model, SHORT, always=True):
        assert torch.equal(run(model, inputs), outs[0]) and torch.equal(outs[1], outs[0])


@pytest.mark.parametrize("options", [{"always": True}, {"strict": True}, {"backend": "tiles"}])
@pytest.mark.parametrize("make", [vit, tiny_models.flux])
def test_long_lists_run_where_they_must(make, options, long_lists_lose):
    model, inputs = make()
    with visattn.apply(model, LONG, **options) as handle:
        run(model, inputs)
        report = handle.report()
    assert report.kept == 0 and report.hits == len(report.modules)


@pytest.mark.filterwarnings("ignore:no attention module:UserWarning")
def test_one_long_list_decides_nothing_for_the_next_call(long_lists_lose):
    model, inputs = vit()
    flat = (torch.zeros_like(inputs[0]),)
    pattern = "above(tau=0.01, bar=share, most=1.0, block=2x2)"
    with visattn.apply(model, pattern) as handle:
        counts = []
        for given in (flat, inputs, flat):
            run(model, given)
            counts.append((handle.report().hits, handle.report().kept))
    assert counts[0] == (0, 2) and counts[1][0] + counts[1][1] == 4 and counts[2][0] + counts[2][1] == 6


def test_attention_itself_runs_what_it_is_asked_for():
    """Nobody weighs: the pattern is what was asked for, whatever it lists."""
    q, k, v = torch.randn(3, 1, 64, 2, 16)
    out = visattn.attention(q, k, v, LONG, visattn.Layout((8, 8)), backend="tiles")
    torch.testing.assert_close(out, visattn.attention(q, k, v, LONG, visattn.Layout((8, 8)), backend="reference"))
