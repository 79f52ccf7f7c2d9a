"""Tensors of ranks that are not all alike: other channels, other dtypes, some without gradients."""

import pytest
import torch

from tests.parallel import mixed, models
from tests.support.ranks import Ranks, needs_context_parallel, needs_gloo
from visattn import Layout, attention, parallel

pytestmark = [pytest.mark.dist, needs_gloo]

CASES = [
    ("halo", "na(window=3x5)", Layout((5, 6))),
    ("halo", "na(window=3x3, dilation=2x1)", Layout((7, 4))),
    ("halo", "na(window=5x3, circular=1x0)", Layout((6, 5))),
    ("ulysses", "clear(radius=2)", Layout((5, 6))),
]


ODD = ["pattern", "batch", "dtype", "mask", "gradient"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def compare(ranks, case, options, close):
    how, pattern, layout = case
    found = ranks.run(2, mixed.ran, how, pattern, layout, *options)
    slabs = parallel.Slabs.even(layout, 2, 0)
    for parts, whole in zip(zip(*found, strict=True), mixed.ran(None, how, pattern, layout, *options), strict=True):
        if whole is None:
            assert parts == (None, None)
        else:
            torch.testing.assert_close(slabs.joined(parts), whole, **close)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
@pytest.mark.parametrize("value_dim", [3, 12])
def test_values_may_have_other_channels_than_keys(ranks, case, value_dim):
    compare(ranks, case, (value_dim,), {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("learns", ["q", "v"])
def test_ranks_exchange_gradients_of_what_learns(ranks, learns):
    compare(ranks, CASES[0], (8, learns), {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("case", [*CASES[:1], ("halo", "linear", Layout((5, 6))), CASES[3]], ids=lambda case: case[1])
def test_autocast_casts_before_anything_travels(ranks, case):
    """Normalised queries and keys are in float32 there, and projected values in bfloat16."""
    compare(ranks, case, (8, "qkv", True), {"rtol": 0.03, "atol": 0.03})


@pytest.mark.parametrize("how", ["halo", "ulysses"])
def test_transforms_of_torch_func_are_refused(ranks, how):
    assert all("nothing under torch.func or in forward mode" in text for text in ranks.run(2, mixed.under_func, how))


@needs_context_parallel
@pytest.mark.parametrize("first", [True, False], ids=["weights first", "tokens first"])
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_weights_and_tokens_are_shared_by_the_same_processes(ranks, name, first):
    """FSDP2 gives each module that it shards a class of its own."""
    alone = models.gradients(0, name, None)
    for found in ranks.run(2, mixed.sharded, name, "halo", first):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("how", ["halo", "ulysses"])
def test_ranks_that_make_different_calls_all_say_so(ranks, how, odd):
    """A transport would end them, wait, or mix what two patterns see."""
    # One that ranks have agreed on is not asked for again.
    layout = Layout((6, 5 + ODD.index(odd)), 2)
    found = ranks.run(2, mixed.unlike, how, odd, layout)
    for text, _ in found:
        assert "ranks make different calls" in text
        assert text.count(f"{how}_attention of na(window=3x") == 2
    whole = attention(*mixed.tensors(layout, 8)[:3], "na(window=3x3)", layout)
    torch.testing.assert_close(parallel.Slabs.even(layout, 2, 0).joined([out for _, out in found]), whole)


def test_tensors_of_tensor_parallelism_are_refused(ranks):
    assert all(text.startswith("k is a DTensor: pass k.to_local()") for text in ranks.run(2, mixed.distributed))
