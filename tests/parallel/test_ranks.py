"""Halo and Ulysses on gloo processes equal one process, forward and backward, and move little; models likewise.

All of it in one file: the processes start once for it.
"""

import pytest
import torch

from tests.parallel import models, sliced
from tests.support import context_parallel, tiny_models
from tests.support.ranks import Ranks, needs_context_parallel, needs_gloo
from visattn import Layout, apply, attention, dense_mask, parallel, parse
from visattn.patterns import PATTERNS

pytestmark = [pytest.mark.dist, needs_gloo]

# Pattern, layout, axis, rows of each rank.
CASES = [
    ("na(window=3x5)", Layout((7, 6), prefix=3), 0, (4, 3)),
    ("na(window=4x3)", Layout((5, 9), suffix=2), 1, (4, 5)),
    ("na(window=3x3x3)", Layout((5, 4, 3), prefix=2, suffix=1), 0, (1, 3, 1)),
    ("na(window=6x5, stride=3x2)", Layout((9, 8), prefix=1), 0, (3, 5, 1)),
    ("na(window=3x3, dilation=2x1)", Layout((8, 5)), 0, (3, 1, 4)),
    ("na(window=3x3, dilation=3x2)", Layout((11, 7), prefix=2), 0, (2, 5, 4)),
    ("na(window=5x3x3, causal=1x0x0)", Layout((6, 4, 3), suffix=2), 0, (2, 4)),
    ("na(window=3x5, circular=0x1)", Layout((4, 9)), 1, (4, 2, 3)),
    ("na(window=3x3, circular=1x1)", Layout((6, 5), prefix=2), 0, (3, 3)),
    ("na(window=2x3, dilation=2x1, circular=1x0)", Layout((6, 5)), 0, (2, 1, 3)),
    ("halo(block=4x4, halo=2)", Layout((10, 9), prefix=3), 0, (3, 7)),
    ("halo(block=2x3, halo=1x2, circular=1x0)", Layout((6, 7)), 0, (2, 2, 2)),
    ("clear(radius=3)", Layout((9, 8), prefix=2), 1, (5, 3)),
    ("clear(radius=2, circular=1x0x0)", Layout((6, 4, 3)), 0, (2, 3, 1)),
    ("radial(decay=0.5, block=8)", Layout((7, 5, 6), prefix=3), 0, (3, 4)),
    ("radial(decay=0.2, sink=false, block=16)", Layout((9, 20)), 0, (3, 1, 5)),
    ("dense", Layout((5, 6), prefix=2), 0, (2, 1, 2)),
    ("groups(1x3)", Layout((4, 7), prefix=1), 1, (3, 4)),
    ("na(window=7x3)", Layout((9, 4), prefix=2, suffix=1), 0, (3, 1, 2, 3)),
    ("clear(radius=2)", Layout((3, 9), prefix=1, suffix=2), 1, (2, 3, 1, 3)),
]


# Those that differ least from others run with the slow tests.
LATER = {1, 3, 6, 9, 11, 15, 18}
# Of each class of patterns one: those that Ulysses runs, and why it refuses the others.
EVERY = [
    *("dense", "na(window=3x3)", "halo(block=2x2, halo=1)", "clear(radius=2)", "radial(block=4)", "groups(2x2)"),
    *("lsh(block=8, samples=0)", "topk(keep=0.5, block=2x2)", "topp(p=0.6, block=2x2)", "above(tau=0.1, block=2x2)"),
    *("agent(agents=2x2)", "linear", "flow", "mala", "best(of=[na(window=3x3), clear(radius=2)])"),
    "kmeans(queries=4, keys=6)",
    "pruned(by=topk(keep=0.5, block=2x2))",
    "verticalslash(least=2, block=4)",
    "clipped(na(window=3x3))",
    "perhead(heads={0: dense, 1-2: na(window=3x3)}, rest=clear(radius=2))",
]
REFUSED = {
    "sigmoid": "parameters",
    "gated(na(window=3x3))": "parameters",
    "selective(na(window=3x3))": "parameters",
    "sparselinear(na(window=3x3))": "parameters",
    **dict.fromkeys(("sla", "sla2", "vsa"), "parameters"),
    "gate(by=topk(keep=0.5, block=2x2))": "parameters",
    "centroids": "parameters",
    "wersa": "parameters",
    "agentsd": "merges",
    # Here is no run: see `test_what_steps_share_is_shared_by_each_rank_for_its_heads`.
    **dict.fromkeys(("residual(of=na(window=3x3))", "broadcast"), "knows no steps"),
    "lsh": "depends on the other heads",
    "routing(regions=2x2, topk=1)": "depends on the other heads",
    "topk(keep=0.5, block=2x2, share=2)": "depends on the other heads",
    "topk(keep=0.5, block=2x2, per=all)": "depends on the other heads",
    "perhead(heads={0-1: topk(keep=0.5, block=2x2, share=2)}, rest=dense)": "depends on the other heads",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def alone(pattern, layout, heads, kv_heads, masked):
    """Output and gradients of one process."""
    q, k, v, grad = sliced.tensors(layout, heads, kv_heads)
    for t in (q, k, v):
        t.requires_grad_()
    mask = sliced.key_mask(layout) if masked else None
    out = attention(q, k, v, pattern, layout, key_mask=mask, backend="auto")
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def joined(slabs, parts, summed):
    """The whole of the ranks' tensors; dense tokens are equal on all, or their sum is wanted."""
    whole = slabs.joined(parts)
    layout, rest = slabs.layout, [0, 0]
    for rank, part in enumerate(parts):
        local = slabs.local(rank)
        rest[0] = rest[0] + part[:, : local.prefix]
        rest[1] = rest[1] + part[:, local.prefix + local.tokens :]
    if not summed:
        rest = [x / slabs.ranks for x in rest]
    return torch.cat([rest[0], whole[:, layout.prefix : layout.prefix + layout.tokens], rest[1]], 1)


def test_an_answer_that_came_late_is_not_that_of_the_next_job(tmp_path):
    group = Ranks(1, tmp_path)
    group.patience = 0
    with pytest.raises(AssertionError, match="no answer in 0 s"):
        group.run(1, max, 7)
    group.patience = 200
    assert group.run(1, max, 5) == [5]
    group.close()


def compare(ranks, how, pattern, layout, axis, sizes, heads=4, kv_heads=2, masked=False):
    found = ranks.run(len(sizes), sliced.sliced, how, pattern, layout, axis, sizes, heads, kv_heads, masked)
    return same(found, pattern, layout, axis, sizes, heads, kv_heads, masked)


def same(found, pattern, layout, axis, sizes, heads, kv_heads, masked):
    """Compare what the ranks found with one process."""
    slabs = parallel.Slabs(layout, axis, sizes)
    expected = alone(pattern, layout, heads, kv_heads, masked)
    for i, name in enumerate(("out", "q", "k", "v")):
        whole = joined(slabs, [tensors[i] for tensors, _ in found], summed=i > 0)
        torch.testing.assert_close(whole, expected[i], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    return slabs, [parallel.Moved(*moved) for _, moved in found]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (i in LATER), id=f"{c[0]} {c[3]}") for i, c in enumerate(CASES)],
)
def test_halo_equals_one_process_and_moves_what_the_mask_needs(ranks, case):
    slabs, moved = compare(ranks, "halo", *case)
    pattern, layout = case[:2]
    bytes_of_token = 2 * 2 * 2 * 8 * 8
    inside = slice(layout.prefix, layout.prefix + layout.tokens)
    seen = dense_mask(pattern, layout)[inside, inside]
    owner = slabs.joined([torch.full((1, slabs.local(r).length), r) for r in range(slabs.ranks)])[0, inside]
    row = torch.arange(layout.tokens) // torch.tensor(layout.grid[slabs.axis + 1 :]).prod().long() % slabs.rows
    for rank, one in enumerate(moved):
        needed = seen[owner == rank].any(0) & (owner != rank)
        rows = torch.isin(row, row[needed])
        assert one.received == int((rows & (owner != rank)).sum()) * bytes_of_token
        # Blocks of radial attention end inside of frames, of which it fetches the whole.
        assert torch.equal(rows & (owner != rank), needed) or pattern.startswith("radial")
    assert sum(one.sent for one in moved) == sum(one.received for one in moved)


STATES = [
    ("linear", Layout((5, 6), prefix=2, suffix=1), 0, (2, 3)),
    ("linear(feature=relu)", Layout((4, 5)), 1, (2, 3)),
    ("linear(causal=1x0x0, decay=heads)", Layout((7, 3, 2), prefix=2), 0, (2, 1, 4)),
    ("linear(causal=1x0, decay=0.3)", Layout((6, 5), suffix=2), 1, (3, 2)),
    ("linear(causal=true)", Layout((40,), prefix=1), 0, (9, 20, 11)),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", STATES, ids=lambda case: case[0])
def test_states_of_linear_attention_are_all_that_travels(ranks, case, masked):
    slabs, moved = compare(ranks, "halo", *case, masked=masked)
    # A number of states, each of the features x (channels and the sum of weights), and the peak of the features.
    causal = parse(case[0]).causal_axis(slabs.layout.grid)
    states = 1 if causal is None else 2 if causal == slabs.axis else slabs.layout.grid[causal]
    size = 2 * 4 * states * (8 * 9 + 1) * 8 * (slabs.ranks - 1)
    assert all(one.sent == one.received == size for one in moved)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[12], CASES[14]], ids=lambda case: case[0])
def test_masked_keys_stay_masked_on_every_rank(ranks, case):
    compare(ranks, "halo", *case, heads=3, kv_heads=3, masked=True)


@pytest.mark.parametrize("case", [CASES[2], CASES[12]], ids=lambda case: case[0])
@pytest.mark.parametrize(("heads", "kv_heads", "masked"), [(5, 5, True), (9, 3, False)])
def test_ulysses_takes_uneven_slabs_and_heads(ranks, case, heads, kv_heads, masked):
    slabs, moved = compare(ranks, "ulysses", *case, heads=heads, kv_heads=kv_heads, masked=masked)
    tokens, row = slabs.layout.tokens, 2 * 8 * 8
    shares = parallel.ulysses.head_shares(kv_heads, slabs.ranks)
    for rank, one in enumerate(moved):
        own, per = slabs.local(rank).tokens, heads // kv_heads
        q_and_kv = (tokens - own) * shares[rank] * (per + 2) * row
        outputs = slabs.local(rank).length * (kv_heads - shares[rank]) * per * row
        assert one.received == q_and_kv + outputs


def test_every_pattern_runs_under_ulysses_or_says_why_not(ranks):
    assert {type(parse(text)) for text in (*EVERY, *REFUSED)} == set(PATTERNS)
    about = Layout((8, 6), prefix=2), 0, (2, 3, 3), 6, 6, False
    found = ranks.run(3, sliced.every, "ulysses", [*EVERY, *REFUSED], *about)
    assert not [said for of_rank in found for said in of_rank[: len(EVERY)] if isinstance(said, str)]
    for i, pattern in enumerate(EVERY):
        same([of_rank[i] for of_rank in found], pattern, *about)
    for of_rank in found:
        for (pattern, why), said in zip(REFUSED.items(), of_rank[len(EVERY) :], strict=True):
            assert isinstance(said, str) and why in said, (pattern, said)


def test_heads_with_patterns_of_their_own_keep_them_on_their_ranks(ranks):
    pattern = "perhead(heads={0: dense, 1-2: na(window=3x3)}, rest=clear(radius=2))"
    compare(ranks, "ulysses", pattern, Layout((8, 6), prefix=2), 0, (2, 3, 3), 6, 6)
    # On a grid that is large beside the windows the dense head costs as much as several others, and is alone.
    cost = parallel.ulysses._cost(parse(pattern), Layout((64, 64)), 6, 1)
    assert parallel.ulysses.head_shares(6, 3, cost)[0] == 1


@pytest.mark.parametrize("text", ["residual(of=na(window=3x3x3), every=2)", "broadcast(every=3, drift=inf)"])
def test_what_steps_share_is_shared_by_each_rank_for_its_heads(ranks, text):
    alone = models.steps(0, text, None)
    for outs, refreshed in ranks.run(2, models.steps, text, "ulysses"):
        assert refreshed == alone[1] and all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(outs, alone[0], strict=True)
        )
    assert all(
        "parallel='halo': a step that refreshes reads keys of every rank" in said
        for said in ranks.run(2, models.refused, "wan", text, "halo")
    )


def test_what_slabs_cannot_run_is_refused_with_the_reason(ranks):
    grid = Layout((6, 6))
    for pattern, why in (
        ("topk(keep=0.5, block=2x2)", "computed from q and k"),
        ("mala", "composition whose parts read tokens of every rank"),
        ("linear(feature=hedgehog)", "its feature map has parameters"),
        ("clear(radius=2, pool=3)", "pooled keys are means of cells"),
        ("clear(radius=4, circular=1x0)", "goes around the ring"),
    ):
        assert all(why in text for text in ranks.run(3, sliced.refused, "halo", pattern, grid, 0)), pattern
    assert "cut axis 0, the frames" in ranks.run(3, sliced.refused, "halo", "radial(block=8)", grid, 1)[0]
    assert "4 key heads" not in ranks.run(3, sliced.refused, "ulysses", "na(window=3x3)", grid, 0)[0]


@pytest.mark.parametrize(("how", "pattern"), [("halo", "na(window=3x3)"), ("halo", "linear"), ("ulysses", "dense")])
def test_second_derivatives_are_refused(ranks, how, pattern):
    said = ranks.run(2, sliced.graphed, how, pattern, Layout((6, 4)))
    assert all("first derivatives only: leave create_graph=True out" in each for each in said)


def test_heads_go_to_ranks_by_what_they_cost():
    assert parallel.ulysses.head_shares(8, 3) in {(3, 3, 2), (2, 3, 3), (3, 2, 3)}
    assert parallel.ulysses.head_shares(4, 2, (9, 1, 1, 1)) == (1, 3)
    assert parallel.ulysses.head_shares(5, 3, (1, 1, 1, 5, 5)) == (3, 1, 1)
    with pytest.raises(ValueError, match="2 key heads cannot be given to 3 ranks"):
        parallel.ulysses.head_shares(2, 3)


def test_slabs_are_checked_and_cut_where_it_costs_least():
    layout = Layout((21, 90, 160))
    assert parallel.best_axis(layout, 2) == 2
    assert parallel.best_axis(Layout((16, 6, 6)), 4) == 0
    assert parallel.Slabs.even(layout, 2).sizes == (11, 10)
    with pytest.raises(ValueError, match="must be rows of each rank"):
        parallel.Slabs(layout, 0, (10, 10))
    with pytest.raises(ValueError, match="21 rows, and 22 ranks"):
        parallel.Slabs.even(layout, 22)
    with pytest.raises(ValueError, match="no axis of 2x2 has 3 rows"):
        parallel.best_axis(Layout((2, 2)), 3)
    x = torch.arange(Layout((3, 4), 2, 1).length)[None]
    slabs = parallel.Slabs(Layout((3, 4), 2, 1), 1, (3, 1))
    assert torch.equal(slabs.joined([slabs.shard(x, r) for r in range(2)]), x)


def compare_models(found, alone):
    for out, (hits, _, moved, said) in found:
        torch.testing.assert_close(out, alone[0], rtol=1e-5, atol=2e-6)
        assert hits == alone[1][0]
        assert moved > 0 and said


@needs_context_parallel
@pytest.mark.parametrize("name", models.MODELS)
def test_every_class_gives_what_one_process_gives(ranks, name):
    alone = models.output(name)
    halo, ulysses = (ranks.run(2, models.on_rank, name, how) for how in ("halo", "ulysses"))
    compare_models(halo, alone)
    compare_models(ulysses, alone)
    # What is exchanged is a border.
    assert halo[0][1][2] < ulysses[0][1][2]


@needs_context_parallel
@pytest.mark.parametrize("name", [pytest.param("wan", marks=pytest.mark.slow), "flux"])
def test_weights_get_the_gradients_of_one_process(ranks, name):
    alone = models.gradients(0, name, None)
    for how in ("halo", "ulysses"):
        for found in ranks.run(2, models.gradients, name, how):
            assert found.keys() == alone.keys()
            for key, grad in alone.items():
                torch.testing.assert_close(
                    found[key], grad, rtol=1e-3, atol=1e-7, msg=lambda text, k=key: f"{k}: {text}"
                )


@needs_context_parallel
def test_compiled_code_gives_what_one_process_gives(ranks):
    alone, (hits, *_) = models.output("wan")
    for outs, counted, moved in ranks.run(2, models.compiled, "wan", "ulysses"):
        for out in outs:
            torch.testing.assert_close(out, alone, rtol=1e-5, atol=2e-6)
        assert counted == 2 * hits and moved


@needs_context_parallel
def test_compiled_blocks_learn_on_ranks(ranks):
    alone = models.gradients(0, "wan", None)
    for found in ranks.run(2, models.gradients, "wan", "halo", True):
        for key, grad in alone.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=2e-6)


@needs_context_parallel
def test_dense_steps_run_in_the_same_slabs(ranks):
    alone = models.output("flux", dense_steps=1)
    for how in ("halo", "ulysses"):
        for out, (hits, dense, moved, _) in ranks.run(2, models.on_rank, "flux", how, 1):
            torch.testing.assert_close(out, alone[0], rtol=1e-5, atol=2e-6)
            assert (hits, dense) == (0, alone[1][1]) and moved


@needs_context_parallel
@pytest.mark.parametrize("how", ["halo", "ulysses"])
def test_hooks_of_diffusers_rest_meanwhile(ranks, how):
    # Ulysses beside the hooks of ulysses_anything.
    alone, _ = models.output("wan")
    model, inputs = tiny_models.wan()
    stock = tiny_models.run(model, inputs)
    for out, after in ranks.run(2, models.with_hooks, "wan", how):
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=2e-6)
        if after is not None:
            torch.testing.assert_close(after, stock, rtol=1e-5, atol=2e-6)


@needs_context_parallel
def test_four_processes_share_a_model(ranks):
    # With fewer heads than processes, dense layers fetch all keys.
    name = "wan, a layer and a step dense"
    compare_models(ranks.run(4, models.on_rank, name, "halo"), models.output(name))


@needs_context_parallel
def test_a_mesh_says_which_processes(ranks):
    alone, _ = models.output("ltx")
    for out, said in ranks.run(2, models.on_a_mesh, "ltx", "halo"):
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=2e-6)
        assert "must be a DeviceMesh of one axis or a process group" in said


@needs_context_parallel
def test_what_cannot_be_cut_is_refused_with_the_reason(ranks):
    for build, pattern, how, why in (
        ("hunyuan_video", "na(window=3x3x3)", "halo", "no _cp_plan"),
        ("ltx2", "na(window=3x3x3)", "ulysses", "a second stream"),
        ("wan", "topk(keep=0.5, block=2x2x2)", "halo", "use parallel='ulysses'"),
        ("wan", "mala", "halo", "use parallel='ulysses'"),
        ("wan", "routing(regions=2, topk=1)", "ulysses", "depends on the other heads"),
    ):
        assert all(why in text for text in ranks.run(2, models.refused, build, pattern, how)), build
    with pytest.raises(ValueError, match="there is no process group: start with torchrun"):
        apply(tiny_models.wan()[0], "na(window=3x3x3)", parallel="halo")
    with pytest.raises(ValueError, match="must be 'ulysses', 'halo' or None"):
        apply(tiny_models.wan()[0], "na(window=3x3x3)", parallel="ring")


@needs_context_parallel
def test_diffusers_own_ulysses_equals_one_process_and_ring_is_refused(ranks):
    alone = context_parallel.outputs(lambda model: None)
    for found in ranks.run(2, context_parallel.work):
        for name, (out, hits) in alone.items():
            torch.testing.assert_close(found[name][0], out, rtol=1e-5, atol=1e-6)
            assert found[name][1] == hits
        torch.testing.assert_close(found["later"][0], alone["wan"][0], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["dense step"][0], torch.zeros_like(found["dense step"][0]))
        assert found["dense step"][1] == 2
        assert "ring context parallelism (ring_degree=2) shows a device the keys piece by piece" in found["ring"]
        assert "ulysses_anything=True splits tokens and heads unevenly" in found["anything"]
