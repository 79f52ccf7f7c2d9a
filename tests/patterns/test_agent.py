import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn import dense_mask, parse, plan
from visattn.attend import backends
from visattn.kernels.agent.agent_sd import agent_sd, agents_pay, match
from visattn.kernels.agent.attention import Convolution, _equal_cells, agent_attention, pool_queries
from visattn.layout import Layout
from visattn.patterns import Agent


def averages(q, grid, shape, shown):
    """Adaptive average pooling by its definition: cell a of n tokens in r is [a n // r, ceil((a + 1) n / r)).

    Of the tokens shown [B, N]; also which cells [B, n] show any.
    """
    index = torch.arange(math.prod(grid)).view(grid)
    share = torch.zeros(math.prod(shape), math.prod(grid), dtype=q.dtype)
    for row, cell in zip(share, itertools.product(*map(range, shape)), strict=True):
        box = tuple(slice(a * n // r, -(-(a + 1) * n // r)) for a, n, r in zip(cell, grid, shape, strict=True))
        row[index[box].flatten()] = 1
    share = share * shown[:, None]
    total = share.sum(-1, keepdim=True)
    return torch.einsum("ban,bnhd->bahd", share / total.clamp(min=1), q), total[..., 0] > 0


def slow_agent(q, k, v, layout, shape, key_mask=None, gather_bias=None, read_bias=None):
    """Two masked dense attentions."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    shown = torch.ones(q.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    agents, there = averages(q[:, inner], layout.grid, shape, shown[:, inner])
    seen = shown[:, None].expand(-1, agents.shape[1], -1)
    gathered = dense_attention(agents, k, v, seen, q.shape[3] ** -0.5, gather_bias)
    return dense_attention(
        q, agents, gathered, there[:, None].expand(-1, q.shape[1], -1), q.shape[3] ** -0.5, read_bias
    )


def test_equal_cells_are_averaged_as_by_pooling():
    grid = torch.randn(2, 6, 8, 10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)
    ours = _equal_cells(grid, (3, 2, 5))
    torch.testing.assert_close(ours, torch.nn.functional.adaptive_avg_pool3d(grid, (3, 2, 5)))


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_equals_two_dense_attentions(data):
    layout = data.draw(layouts())
    agents = tuple(data.draw(st.sampled_from([-1, *range(1, n + 3)])) for n in layout.grid)
    pattern = Agent(agents)
    shape = tuple(n if a == -1 else a for a, n in zip(agents, layout.grid, strict=True))
    assert pattern.shape(layout.grid) == shape and pattern.count(layout.grid) == math.prod(shape)
    q, k, v = qkv(layout, 4, data.draw(st.sampled_from([1, 2, 4])), 6, batch=2, grad=True)
    key_mask = None
    if data.draw(st.booleans()):
        share = data.draw(st.sampled_from([0.1, 0.6]))
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < share
        key_mask[1] = False
        if data.draw(st.booleans()):
            # Keys without agents: no token of the grid is left.
            key_mask[1, : layout.prefix] = True
    out = visattn.attention(q, k, v, pattern, layout, key_mask=key_mask)
    truth = slow_agent(q, k, v, layout, shape, key_mask)
    assert out.isfinite().all() and (out - truth).abs().max() < 1e-10
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(truth, (q, k, v)), strict=True):
        assert ours.isfinite().all() and (ours - theirs).abs().max() < 1e-10
    assert str(parse(str(pattern))) == str(pattern)


def test_padding_is_as_if_it_were_not_there():
    whole, real = Layout((6, 8)), Layout((6, 4))
    q, k, v = qkv(whole, 2, dim=6, batch=2)
    shown = (torch.arange(48) % 8 < 4).expand(2, -1)
    cut = [t[shown].unflatten(0, (2, 24)) for t in (q, k, v)]
    out = visattn.attention(q, k, v, "agent(agents=3x4)", whole, key_mask=shown)
    alone = visattn.attention(*cut, "agent(agents=3x2)", real)
    assert (out[shown].unflatten(0, (2, 24)) - alone).abs().max() < 1e-12
    seen = torch.ones_like(shown)
    assert torch.allclose(
        visattn.attention(q, k, v, "agent(agents=3x4)", whole, key_mask=seen),
        visattn.attention(q, k, v, "agent(agents=3x4)", whole),
        atol=1e-12,
    )


def test_one_agent_per_token_reads_its_own_attention():
    layout = Layout((3, 4))
    q = qkv(layout)[0]
    assert (pool_queries(q, Agent(-1), layout)[0] - q).abs().max() < 1e-12
    assert str(Agent((7, 7))) == "agent(agents=7x7)"


@pytest.mark.parametrize("masked", [False, True])
def test_biases_and_convolution(masked):
    layout = Layout((5, 6), prefix=1)
    q, k, v = qkv(layout, 2, dim=4, batch=2, grad=True)
    gather = torch.randn(2, 9, 31, dtype=torch.float64, requires_grad=True)
    read = torch.randn(2, 31, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    key_mask = (torch.arange(31) % 3 > 0).expand(2, -1) if masked else None
    out = agent_attention(
        q,
        k,
        v,
        Agent(3),
        layout,
        key_mask=key_mask,
        gather_bias=gather,
        read_bias=read,
        convolution=Convolution(weight),
    )
    truth = slow_agent(q, k, v, layout, (3, 3), key_mask, gather, read)
    image = torch.nn.functional.pad(v[:, 1:].unflatten(1, (5, 6)).flatten(3), (0, 0, 1, 1, 1, 1))
    local = sum(image[:, y : y + 5, x : x + 6] * weight[:, 0, y, x] for y, x in itertools.product(range(3), range(3)))
    truth = torch.cat([truth[:, :1], truth[:, 1:] + local.flatten(1, 2).unflatten(2, (2, 4))], 1)
    assert (out - truth).abs().max() < 1e-10
    inputs = (q, k, v, gather, read, weight)
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("grid", [(9,), (3, 2, 4)])
def test_convolution_in_one_and_three_dimensions(grid):
    layout = Layout(grid, 1, 2)
    q, k, v = qkv(layout, 2, dim=3)
    weight, bias = torch.zeros(6, 1, *[3] * len(grid), dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight[(slice(None), 0, *[1] * len(grid))] = 2.0
    plain = agent_attention(q, k, v, Agent(2), layout)
    added = agent_attention(q, k, v, Agent(2), layout, convolution=Convolution(weight, bias)) - plain
    inner = slice(1, 1 + layout.tokens)
    assert (added[:, inner] - 2 * v[:, inner] - bias.view(2, 3)).abs().max() < 1e-10
    assert (added[:, 0] == 0).all() and (added[:, -2:] == 0).all()


def test_compiles_as_one_graph():
    layout = Layout((6, 6), prefix=1)
    q, k, v = qkv(layout, grad=True)

    def call(*inputs):
        return visattn.attention(*inputs, "agent(agents=3)", layout)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, truth = compiled(q, k, v), call(q, k, v)
    assert torch.allclose(out, truth, atol=1e-12)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(truth, (q, k, v)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agent(agents=0)", r"agents=0 must be a whole number of at least 1 or -1"),
        ("agent(agents=7x7x7)", r"agents=7x7x7 has 3 values but the grid has 2 axes"),
        ("agent(agents=7x7)", r"agent\(agents=7x7\) has no tile plan: it is two dense attentions through 49 agents"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout((8, 8)))


def test_refusals():
    layout = Layout((8, 8))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match=r"agent\(agents=2\) has no mask: every token reads every other"):
        dense_mask("agent(agents=2)", layout)
    with pytest.raises(ValueError, match=r"backend 'agent' cannot run this call: it runs agent patterns only, not na"):
        visattn.attention(q, k, v, "na(window=3)", layout, backend="agent")
    with pytest.raises(
        ValueError, match=r"no backend can run agent\(agents=2\) on 8x8: .*agent: two attentions in a row"
    ):
        visattn.attention(q, k, v, "agent(agents=2)", layout, return_lse=True)
    for name in backends():
        if name != "agent" and backends()[name].ok:
            with pytest.raises(ValueError, match=rf"backend '{name}' cannot run this call: .*agent"):
                visattn.attention(q, k, v, "agent(agents=2)", layout, backend=name)


def test_auto_takes_the_agent_backend():
    assert visattn.explain("agent(agents=7)", Layout((32, 32)), torch.empty(1, 1024, 2, 32)).choice == "agent"


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("seed", [None, 3])
def test_merging_and_unmerging(grid, seed):
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 5, dtype=torch.float64)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    matching = match(x, grid, (2, 4), generator)
    cells = (grid[0] // 2) * (grid[1] // 4)
    assert len(matching.destinations) == cells
    cell = {(int(d) // grid[1] // 2, int(d) % grid[1] // 4) for d in matching.destinations}
    assert len(cell) == cells, "one destination per cell"
    for merged in (0, 1, 10, n - cells):
        packed = matching.merge(x, merged)
        assert packed.shape == (2, n - merged, 5)
        back = matching.unmerge(packed, merged)
        for b in range(2):
            groups = {int(d): [int(d)] for d in matching.destinations}
            for s, t in zip(matching.sources[b, :merged], matching.targets[b, :merged], strict=True):
                groups[int(matching.destinations[t])].append(int(s))
            single = set(range(n)) - {i for members in groups.values() for i in members}
            for members in groups.values():
                mean = x[b, members].mean(0)
                assert (back[b, members] - mean).abs().max() < 1e-12
            assert all(torch.equal(back[b, i], x[b, i]) for i in single)


def test_sources_merge_most_alike_first():
    x = torch.randn(1, 36, 4, dtype=torch.float64)
    matching = match(x, (6, 6), (2, 2))
    unit = x / x.norm(dim=-1, keepdim=True)
    best = (unit[0, matching.sources[0]] * unit[0, matching.destinations[matching.targets[0]]]).sum(-1)
    assert (best.diff() <= 1e-12).all()
    assert (best[:, None] >= unit[0, matching.sources[0]] @ unit[0, matching.destinations].T - 1e-12).all()
    assert matching.destinations.tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]


def test_agents_of_stable_diffusion():
    q, k, v = qkv(Layout((4, 4)), 2, dim=6, grad=True)
    agents = torch.randn(1, 3, 2, 6, dtype=torch.float64)
    out = agent_sd(q, k, v, agents, read_scale=0.3, shortcut=0.075)
    seen = torch.ones(3, 16, dtype=torch.bool)
    truth = dense_attention(q, agents, dense_attention(agents, k, v, seen, 6**-0.5), seen.T, 6**-0.15) + 0.075 * v
    assert (out - truth).abs().max() < 1e-12
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(truth, (q, k, v)), strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    # The released settings: agents in the first 20 steps (ratio .95 in 4x4 cells), plain merging after (.5, 2x2).
    assert agents_pay(4096, int(0.4 * 4096), 4096 - 256) and not agents_pay(4096, int(0.4 * 4096), 2048)
