"""Turns of the one-pass backward: every visit has one, in the order in which programs start; the kernel compiles."""

import numpy as np
import pytest
import torch

from visattn import Layout, parse

pytest.importorskip("triton")

from visattn.kernels.triton import ahead, arguments, resources
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.config import DIRECTIONS, ONE_PASS, SHARED_MEMORY
from visattn.kernels.triton.hopper.launch import finish_launch, one_pass_buffers, one_pass_launch
from visattn.kernels.triton.hopper.turns import turns
from visattn.kernels.triton.start import Starts

CASES = [
    ("na(window=13x13)", Layout((30, 37), prefix=7, suffix=77)),
    ("clear(radius=9,pool=4)", Layout((38, 41), suffix=33)),
    ("na(window=5x9x9,causal=true)", Layout((7, 20, 13))),
    ("dense", Layout(700, prefix=5)),
]


@pytest.mark.parametrize(("pattern", "layout"), CASES)
def test_turns_count_the_programs_that_start_before(pattern, layout):
    plan = plan_of(parse(pattern), layout, "key_grad", ONE_PASS[128])
    listed = turns(plan, torch.device("cpu"))
    bounds, visits, rows, columns = (x.numpy() for x in (listed.bounds, listed.visits, listed.rows, listed.columns))
    # Grid tiles start in the order of the grid, behind those of text.
    first = rows[listed.run.dense_rows :].max(1)
    tile = {token: i for i, tokens in enumerate(plan.keys.tokens) for token in tokens}
    assert [tile[t] for t in first] == sorted(tile[t] for t in first)
    before = np.zeros(len(columns), int)
    found = []
    for row, (start, _, stop, _) in enumerate(bounds):
        at, turn, mask, _ = visits[start:stop].T
        assert (turn == before[at]).all() and (np.diff(turn) >= 0).all()
        assert (listed.bases.numpy()[start:stop] == columns[at, 0]).all()
        before[at] += 1
        found += [seen(rows[row], columns[t], listed.masks, m) for t, m in zip(at, mask, strict=True)]
    run = listed.run
    expected = []
    for tokens, (start, split, stop, _) in zip(run.tokens.numpy(), run.bounds.numpy(), strict=True):
        for i in range(start, stop):
            (at,) = np.flatnonzero(columns[:, 0] == int(run.bases[i]))
            mask = int(run.mask_ids[i]) if i >= split else -1
            expected.append(seen(tokens, columns[at], run.masks, mask))
    expected = np.concatenate(expected)
    assert (np.sort(np.concatenate(found)) == np.sort(expected[expected >= 0])).all()


def seen(keys, queries, masks, mask):
    """What a visit computes: a number for each pair of a key and a query, a negative one where a slot has no key."""
    words = masks.numpy()[mask] if mask >= 0 else np.full((len(keys), 2), -1)
    bits = (words[:, :, None] >> np.arange(32) & 1).reshape(len(keys), -1)[:, : len(queries)]
    row, column = np.nonzero(bits)
    assert (queries[column] >= 0).all()
    return keys[row].astype(np.int64) * 2**20 + queries[column]


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "order"), [(64, 1), (128, 1), (128, 2)])
def test_the_one_pass_kernel_compiles(dim, order):
    pattern, layout = parse("na(window=24x24)"), Layout((48, 48), prefix=16)
    launch = ONE_PASS[dim]._replace(one_pass=order)
    work = arguments.Work(pattern, layout, 0.125, False, dict.fromkeys(DIRECTIONS, launch), Starts(torch.device("cpu")))
    x = torch.empty(1, layout.length, 24, dim, dtype=torch.bfloat16)
    lse = torch.empty(1, 24, layout.length)
    t = arguments.Operands(x, x, x, out=x, lse=lse, delta=lse, grad_out=x, grad_q=x, grad_k=x, grad_v=x)
    t.sums, t.turns = one_pass_buffers(t, work)
    made, last = one_pass_launch(t, work), finish_launch(t, work)
    assert made.grid == ((18 + 1) * 24,) and last.grid == (36 * 24,)
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": made.warps, "enable_fp_fusion": True}
    binary = triton.compile(ahead.source(made.kernel, made.given), target=GPUTarget("cuda", 90, 32), options=options)
    used = ahead._used(binary, True)
    assert used.fits(SHARED_MEMORY[90], resources.HOPPER_SPILLS), used
