"""attention() inside torch.compile(fullgraph=True): one opaque operator with a gradient."""

import pytest
import torch

import visattn
from tests.support.cases import gradients, qkv
from visattn.layout import Layout
from visattn.patterns import PATTERNS, Neighborhood

LAYOUT = Layout((5, 6), 2, 1)


def compiled(function):
    torch._dynamo.reset()
    # The tracer and autograd are what can break; the code generator behind them is torch's own affair.
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def same(function, inputs):
    ours, theirs = compiled(function)(*inputs), function(*inputs)
    assert (ours - theirs).abs().max() < 1e-12
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    for a, b in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["auto", "tiles", "sdpa", "reference"])
@pytest.mark.parametrize(
    "pattern", ["na(window=3, dilation=1x2)", Neighborhood((3, 4), stride=2), "clear(radius=2, pool=2)"]
)
def test_text_and_object_patterns(pattern, backend):
    same(lambda q, k, v: visattn.attention(q, k, v, pattern, LAYOUT, backend=backend).sin(), qkv(LAYOUT, grad=True))


def test_key_mask_bias_and_grouped_heads():
    q, k, v = qkv(LAYOUT, 4, 2, grad=True)
    key_mask = torch.rand(1, LAYOUT.length) < 0.7
    rpb = torch.randn(4, 5, 5, dtype=q.dtype, requires_grad=True)

    def step(q, k, v, rpb, key_mask):
        return visattn.attention(q, k, v, "na(window=3)", LAYOUT, rpb=rpb, key_mask=key_mask, scale=0.2) * 2

    same(step, (q, k, v, rpb, key_mask))


def test_pool_weight_gets_its_gradient():
    q, k, v = qkv(LAYOUT, grad=True)
    weight = torch.rand(2, 2, dtype=q.dtype, requires_grad=True)

    def step(q, k, v, weight):
        return visattn.attention(q, k, v, "clear(radius=2, pool=2)", LAYOUT, pool_weight=weight)

    same(step, (q, k, v, weight))


def test_log_sum_exp_and_its_gradient():
    def step(q, k, v):
        out, lse = visattn.attention(q, k, v, "na(window=3)", LAYOUT, return_lse=True)
        return out * lse[..., None]

    same(step, qkv(LAYOUT, grad=True))


def test_no_gradient_asked():
    def step(q, k, v):
        return visattn.attention(q, k, v, "na(window=3)", LAYOUT)

    inputs = qkv(LAYOUT)
    with torch.no_grad():
        assert torch.equal(compiled(step)(*inputs), step(*inputs))


def test_a_changing_pattern_and_grid_give_their_own_numbers():
    def step(q, k, v, pattern, layout):
        return visattn.attention(q, k, v, pattern, layout)

    run = compiled(step)
    for grid in ((5, 6), (6, 5)):
        for pattern in ("na(window=3)", "dense", "clear(radius=2)"):
            layout = Layout(grid, 1)
            inputs = qkv(layout)
            assert (run(*inputs, pattern, layout) - step(*inputs, pattern, layout)).abs().max() < 1e-12


def test_a_wrong_call_is_told_while_tracing():
    q, k, v = qkv(LAYOUT)
    run = compiled(lambda q, k, v: visattn.attention(q, k, v, "na(window=3)", Layout((5, 5))))
    with pytest.raises(Exception, match="grid 5x5 has 25 tokens but q has 33"):
        run(q, k, v)


def test_through_the_code_generator():
    torch._dynamo.reset()
    q, k, v = qkv(LAYOUT, dtype=torch.float32, grad=True)

    def step(q, k, v):
        return visattn.attention(q * 2, k, v, "na(window=3)", LAYOUT).relu()

    ours, theirs = torch.compile(step, fullgraph=True)(q, k, v), step(q, k, v)
    assert (ours - theirs).abs().max() < 1e-5
    for a, b in zip(gradients(ours, (q, k, v)), gradients(theirs, (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-5


# One of each kind, and all with parts of their own; agentsd merges tokens, and what steps share needs steps: these are
# none of `attention` alone.
EACH = {
    "dense", "na(window=3)", "halo(block=2, halo=1)", "clear(radius=2, pool=2)", "radial", "groups(2)",
    "routing(regions=2, topk=1)", "topk(keep=0.5)", "topp(p=0.5)", "above(tau=0.5)", "agent(agents=2)", "linear",
    "flow", "mala", "wersa(features=8)",
    "sigmoid(sparse=na(window=3))", "sparselinear(na(window=3))", "clipped", "gated", "selective",
    "sla", "sla2", "vsa", "gate(by=topk(keep=0.5))", "kmeans(queries=3, keys=4)", "lsh",
    "best(of=[dense, na(window=3)])", "perhead(heads={0: dense})", "pruned(by=topk(keep=0.5))",
    "centroids(clusters=2, window=3)", "verticalslash(block=8)",
}  # fmt: skip


@pytest.fixture
def traced():
    """Compiled `attention`, and the code that the tracer made for it so far."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph.forward

    def step(q, k, v, pattern, parameters=None):
        return visattn.attention(q, k, v, pattern, LAYOUT, parameters=parameters)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield torch.compile(step, fullgraph=True, backend=keep), made


def test_objects_of_every_pattern(traced):
    others = ("agentsd", "residual", "broadcast")
    assert {type(visattn.parse(text)) for text in EACH} == {kind for kind in PATTERNS if kind.name not in others}
    run, made = traced
    inputs = qkv(LAYOUT, dim=8)
    for text in sorted(EACH):
        pattern = visattn.parse(text)
        shapes = pattern.parameter_shapes(2, 8, LAYOUT.grid)
        learned = {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}
        ours = run(*inputs, pattern, learned)
        assert torch.equal(ours, visattn.attention(*inputs, pattern, LAYOUT, parameters=learned)), text
    assert len(made) == len(EACH)
    assert all(len([n for n in graph.graph.nodes if "visattn" in str(n.target)]) == 1 for graph in made)


def test_equal_objects_are_traced_once_and_others_again(traced):
    run, made = traced
    inputs = qkv(LAYOUT)
    for window, count in ((3, 1), (3, 1), (5, 2), (3, 2)):
        pattern = Neighborhood(window)
        assert torch.equal(run(*inputs, pattern), visattn.attention(*inputs, pattern, LAYOUT))
        assert len(made) == count


def test_pattern_made_in_compiled_code():
    def step(q, k, v):
        return visattn.attention(q, k, v, Neighborhood((3, 4), stride=2), LAYOUT)

    inputs = qkv(LAYOUT)
    assert torch.equal(compiled(step)(*inputs), step(*inputs))


def test_object_with_values_of_other_channels_than_keys():
    q, k, v = qkv(LAYOUT)
    pattern = Neighborhood(3)

    def step(q, k, v):
        return visattn.attention(q, k, v, pattern, LAYOUT)

    assert torch.equal(compiled(step)(q, k, v[..., :6]), step(q, k, v[..., :6]))
