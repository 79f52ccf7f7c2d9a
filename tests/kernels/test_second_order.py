"""Second derivatives of every engine where everything after the attention is linear, in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.support.cases import qkv
from tests.support.derivatives import derivatives
from visattn import Layout, attention, parse
from visattn.kernels import second_order
from visattn.kernels.agent.attention import agent_attention
from visattn.kernels.reference import backend as reference
from visattn.patterns import Agent
from visattn.problem import Call

# Pattern, layout, and whether the pattern takes a relative position bias.
CASES = {
    "dilated": ("na(window=2x3, dilation=2x1)", Layout((5, 4), 1, 2), True),
    "even window, stride, causal": ("na(window=4, stride=2, causal=true)", Layout(11), True),
    "causal line": ("na(window=-1, causal=true)", Layout(9, 1, 2), True),
    "circle, pooled": ("clear(radius=2, pool=2)", Layout((4, 5), 0, 2), False),
    "radial": ("radial(decay=0.5, block=4)", Layout((2, 7), 1), False),
    "routing": ("routing(regions=2, topk=2)", Layout((5, 4), 1), False),
    "blocks by their scores": ("topp(p=0.5, block=2x3)", Layout((5, 4), 1), False),
    "halo": ("halo(block=2, halo=1)", Layout((5, 3)), False),
    "dense": ("dense", Layout((3, 3), 1, 1), False),
}


def compare(ours, theirs, limit=1e-9):
    assert len(ours) == len(theirs) and all(t.abs().max() > 0 for t in theirs[-2:])
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= limit * max(1.0, b.abs().max().item())


def check_against_differences(run, inputs):
    """Second derivatives in one random direction of all inputs against central differences of the first ones."""
    made = torch.Generator().manual_seed(7)
    weights, directions = ([torch.randn(t.shape, generator=made, dtype=t.dtype) for t in inputs] for _ in range(2))
    out_weight = None

    def gradients(step, graph):
        nonlocal out_weight
        leaves = [(t + step * d).detach().requires_grad_() for t, d in zip(inputs, directions, strict=True)]
        out = run(*leaves)
        if out_weight is None:
            out_weight = torch.randn(out.shape, generator=made, dtype=out.dtype)
        found = torch.autograd.grad((out * out_weight).sum(), leaves, create_graph=graph)
        return leaves, sum((g * w).sum() for g, w in zip(found, weights, strict=True))

    leaves, weighted = gradients(0.0, True)
    second = torch.autograd.grad(weighted, leaves)
    ours = sum((g * d).sum() for g, d in zip(second, directions, strict=True)).item()
    truth = (gradients(1e-4, False)[1] - gradients(-1e-4, False)[1]).item() / 2e-4
    assert abs(truth) > 1e-3
    assert abs(ours - truth) < 1e-5 * max(1.0, abs(truth))


def key_mask_of(layout, batch=2):
    mask = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
    # A sample without any key, and (where windows are small) queries without one.
    mask[0] = False
    return mask


VARIANTS = [
    (name, case, variant)
    for case, (_, _, takes_bias) in CASES.items()
    for name in ("tiles", "sdpa")
    for variant in ("plain", "key mask", "rpb")
    if variant != "rpb" or (takes_bias and name == "tiles")
    # Both compute them by one formula: of other engines' calls a few are enough.
    if name == "tiles" or case in ("routing", "blocks by their scores", "dense", "causal line")
]


@pytest.mark.parametrize(("name", "case", "variant"), VARIANTS)
def test_engines_along_lists_have_those_of_the_reference(name, case, variant):
    text, layout, _ = CASES[case]
    inputs = qkv(layout, heads=4, kv_heads=2, dim=3, batch=2)
    if variant == "rpb":
        inputs.append(torch.randn(4, *parse(text).rpb_shape(layout.grid), dtype=torch.float64))
    mask = None if variant == "plain" else key_mask_of(layout)
    compare(*(derivatives(inputs, text, layout, backend, key_mask=mask) for backend in (name, "reference")))


@pytest.mark.parametrize("lse", [True, False])
def test_third_derivatives(lse):
    layout = Layout((5, 4), 1, 2)
    inputs = [*qkv(layout, dim=3), torch.randn(2, 5, 5, dtype=torch.float64)]
    call = {"key_mask": key_mask_of(layout, 1) | (torch.arange(layout.length) % 2 == 0), "order": 3, "lse": lse}
    compare(*(derivatives(inputs, "na(window=3)", layout, backend, **call) for backend in ("tiles", "reference")))


def test_weights_of_pooled_keys():
    layout = Layout((6, 5), 1)
    inputs = [*qkv(layout, dim=3), torch.rand(2, 2, dtype=torch.float64)]
    call = ("clear(radius=2, pool=2)", layout)
    compare(*(derivatives(inputs, *call, backend, names=["pool_weight"]) for backend in ("tiles", "reference")))


COMPOSED = [
    "agent(agents=2x2)",
    *(f"linear(feature={feature})" for feature in ("elu", "relu", "exp", "hedgehog")),
    "flow",
    "mala",
    "wersa(levels=1, features=8)",
    "sparselinear(sparse=na(window=3))",
    "sigmoid(sparse=clear(radius=1))",
    "gated(of=selective(of=na(window=3)))",
    "linear(causal=1x0, decay=0.5)",
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", COMPOSED)
def test_composed_patterns(text, masked):
    layout = Layout((3, 4), 1, 1)
    pattern = parse(text)
    mask = key_mask_of(layout)[1:] if masked else None
    shapes = pattern.parameter_shapes(2, 3, layout.grid)
    made = torch.Generator().manual_seed(2)
    given = qkv(layout, kv_heads=1, dim=3)
    given += [torch.rand(shape, generator=made, dtype=torch.float64) for shape in shapes.values()]

    def run(q, k, v, *rest):
        parameters = dict(zip(shapes, rest, strict=True))
        return attention(q, k, v, pattern, layout, key_mask=mask, parameters=parameters)

    check_against_differences(run, given)


def test_agent_attention_with_biases():
    layout = Layout((3, 4), 1)
    q, k, v = qkv(layout, dim=3)
    made = torch.Generator().manual_seed(2)
    biases = [torch.randn(1, 2, *sides, generator=made, dtype=torch.float64) for sides in ((4, 13), (13, 4))]
    mask = torch.arange(13)[None] < 9

    def run(q, k, v, gather, read):
        return agent_attention(q, k, v, Agent(2), layout, key_mask=mask, gather_bias=gather, read_bias=read)

    check_against_differences(run, (q, k, v, *biases))


@pytest.mark.parametrize(
    ("text", "backend"), [("na(window=3)", "tiles"), ("dense", "sdpa"), ("agent(agents=2)", "agent")]
)
def test_half_precision(text, backend):
    layout = Layout((4, 5), 1)
    inputs = qkv(layout, dim=8)
    call = (text, layout, backend)
    ours = derivatives([t.bfloat16() for t in inputs], *call, lse=False)
    for a, b in zip(ours, derivatives(inputs, *call, lse=False), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("grid", [(6, 6), (16, 17)])
def test_the_hessian_of_a_sum_is_not_zero(grid):
    layout = Layout(grid)
    q, k, v = qkv(layout, heads=1, dim=2)

    def product(backend):
        loss = lambda q: attention(q, k, v, "na(window=3)", layout, backend=backend).sum()  # noqa: E731
        return torch.autograd.functional.hvp(loss, q, torch.ones_like(q))[1]

    truth = product("reference")
    assert truth.abs().max() > 1e-3
    assert (product("auto") - truth).abs().max() < 1e-12


def test_one_tensor_may_be_queries_keys_and_values():
    layout = Layout((4, 5))

    def product(backend):
        x = qkv(layout, dim=4)[0].requires_grad_()
        loss = attention(x, x, x, "na(window=3)", layout, backend=backend).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    for backend in ("tiles", "sdpa"):
        assert (product(backend) - product("reference")).abs().max() < 1e-10


@pytest.mark.parametrize("backend", ["tiles", "sdpa"])
def test_under_activation_checkpointing(backend):
    layout = Layout((5, 6), 1)
    q, k, v = (t.requires_grad_() for t in qkv(layout, dim=4))

    def products(run):
        loss = run(lambda q: attention(q * 2, k, v, "na(window=3)", layout, backend=backend), q).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), (q, k, v))

    stored = products(lambda f, q: f(q))
    again = products(lambda f, q: checkpoint(f, q, use_reentrant=False))
    for a, b in zip(again, stored, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_pieces_of_problems_give_the_same(monkeypatch):
    layout = Layout((4, 5), 2)
    inputs = [*qkv(layout, heads=4, kv_heads=2, dim=3, batch=2), torch.randn(4, 5, 5, dtype=torch.float64)]
    call = {"key_mask": key_mask_of(layout)}
    whole = derivatives(inputs, "na(window=3)", layout, "tiles", **call)
    monkeypatch.setattr("visattn.kernels.tiles.sides.PRODUCTS", 500)
    compare(derivatives(inputs, "na(window=3)", layout, "tiles", **call), whole, 1e-12)


class Largest(TorchDispatchMode):
    """Watches the largest result of any operator."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                # A view takes no memory.
                self.numel = max(self.numel, 0 if t._is_view() else t.numel())
        return found


def test_no_scores_of_all_pairs_exist(monkeypatch):
    layout = Layout((24, 24), 8)
    q, k, v = (t.requires_grad_() for t in qkv(layout, dim=4))
    monkeypatch.setattr("visattn.kernels.tiles.sides.PRODUCTS", 2**13)
    with Largest() as largest:
        out = attention(q, k, v, "na(window=3)", layout, backend="tiles")
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        torch.autograd.grad(grad.sin().sum(), (q, k, v))
    assert largest.numel < layout.length**2 / 10


class Kernel(torch.autograd.Function):
    """An engine with a first derivative only; it counts how often its backward did something."""

    calls = 0

    @staticmethod
    def forward(ctx, q, k, v, call):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out, lse = reference.run(*leaves, call)
        ctx.save_for_backward(q, k, v)
        ctx.inner = leaves, out, lse
        return out.detach(), lse.detach()

    @staticmethod
    def backward(ctx, *grads):
        leaves, out, lse = ctx.inner
        Kernel.calls += any(g.abs().max() > 0 for g in grads)
        return *(g.detach() for g in torch.autograd.grad((out, lse), leaves, grads, retain_graph=True)), None


def test_engines_of_others(monkeypatch):
    layout = Layout((4, 5), 1)
    call = Call(parse("na(window=3)"), layout, 0.4, lse=True)
    q, k, v = (t.requires_grad_() for t in qkv(layout, dim=3))

    def both(run):
        out, lse = run(q, k, v, call)
        # Callers may change the output in place.
        outputs = [out.mul_(2), lse]
        weights = [torch.ones_like(t) for t in outputs]
        once = torch.autograd.grad(outputs, (q, k, v), weights, retain_graph=True)
        grads = torch.autograd.grad(outputs, (q, k, v), weights, create_graph=True)
        return [*once, *grads, *torch.autograd.grad([g.sin().sum() for g in grads], (q, k, v))]

    monkeypatch.setattr(Kernel, "calls", 0)
    ours = both(lambda *given: second_order.lists_with_formula(Kernel.apply, *given))
    compare(ours, both(reference.run))
    assert Kernel.calls == 1, "its own backward runs where no graph is asked for, and only there"


def test_what_needs_no_gradient_is_a_constant_for_engines():
    layout = Layout((4, 5))
    q, k, v = qkv(layout, dim=3)
    seen = []

    def engine(q, k, v, call):
        seen.append([t.requires_grad for t in (q, k, v)])
        return reference.run(q, k, v, call)

    call = Call(parse("na(window=3)"), layout, 0.4)
    out, _ = second_order.lists_with_formula(engine, q, k.requires_grad_(), v, call)
    (grad,) = torch.autograd.grad(out.sum(), k, create_graph=True)
    assert seen == [[False, True, False]] and torch.autograd.grad(grad.square().sum(), k)[0].abs().max() > 0


def test_a_compiled_call():
    layout = Layout((4, 5), 1)
    q, k, v = (t.requires_grad_() for t in qkv(layout, dim=4))

    def step(q, k, v):
        return attention(q, k, v, "na(window=3)", layout, backend="tiles")

    def products(run):
        (grad,) = torch.autograd.grad(run(q, k, v).sum(), q, create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), (q, k, v))

    torch._dynamo.reset()
    compare(products(torch.compile(step, fullgraph=True, backend="eager")), products(step))
    # The code that the compiler makes of a backward has no derivative, which it says itself.
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        products(torch.compile(step, fullgraph=True, backend="aot_eager"))
