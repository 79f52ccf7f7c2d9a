"""torch.func on attention(): what each sample gives alone, on any engine, or a refusal that names the way."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap

import visattn
from tests.support.cases import qkv
from visattn.layout import Layout
from visattn.patterns import parse

LAYOUT = Layout((5, 6), 1, 2)
SAMPLES = 3
CALLS = {
    "tiles": ("na(window=3)", "tiles"),
    "sdpa": ("na(window=3)", "sdpa"),
    "reference": ("halo(block=2, halo=1)", "reference"),
    "pooled": ("clear(radius=2, pool=2)", "tiles"),
    "routed": ("routing(regions=2x3, topk=2)", "tiles"),
    "agent": ("agent(agents=2x3)", "auto"),
    "linear": ("linear(feature=hedgehog)", "auto"),
    "sigmoid": ("sigmoid(sparse=na(window=3))", "auto"),
    "sparse and linear": ("sparselinear(sparse=na(window=3))", "auto"),
    "clipped": ("clipped(sparse=na(window=3), alpha=0.5)", "auto"),
    "gated": ("gated(of=na(window=3))", "auto"),
    "causal linear": ("linear(causal=1x0, decay=0.5)", "auto"),
    "dense": ("dense", "auto"),
}


def samples(batch=2):
    """q, k and v of several samples."""
    return [torch.stack([t, t.flip(1), -t]) for t in qkv(LAYOUT, batch=batch, dim=6, kv_heads=1)]


def called(call, **more):
    text, backend = CALLS[call]
    return lambda q, k, v, **own: visattn.attention(q, k, v, text, LAYOUT, backend=backend, **more, **own)


def near(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-10


def plain_gradients(loss, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("call", CALLS)
def test_vmap_and_gradients_of_each_sample(call):
    run, (q, k, v) = called(call), samples()
    near(vmap(run)(q, k, v), torch.stack([run(*each) for each in zip(q, k, v, strict=True)]))
    near(
        vmap(run, (2, None, 0))(q.movedim(0, 2), k[0], v),
        torch.stack([run(a, k[0], b) for a, b in zip(q, v, strict=True)]),
    )

    def loss(q, k, v):
        return run(q, k, v).sin().sum()

    one = grad(loss, (0, 1, 2))(q[0], k[0], v[0])
    each = [plain_gradients(loss, *own) for own in zip(q, k, v, strict=True)]
    for ours, theirs in zip(one, each[0], strict=True):
        near(ours, theirs)
    for ours, theirs in zip(vmap(grad(loss, (0, 1, 2)))(q, k, v), zip(*each, strict=True), strict=True):
        near(ours, torch.stack(theirs))


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_log_sum_exp_and_key_masks(backend):
    q, k, v = samples()
    seen = torch.rand(SAMPLES, 2, LAYOUT.length) < 0.7

    def run(q, k, v, seen):
        return visattn.attention(q, k, v, "na(window=3)", LAYOUT, key_mask=seen, backend=backend, return_lse=True)

    def loss(*args):
        out, lse = run(*args)
        return (out.sum(-1) * lse).sum()

    for ours, theirs in zip(vmap(run)(q, k, v, seen), zip(*map(run, q, k, v, seen), strict=True), strict=True):
        near(ours, torch.stack(theirs))
    each = [plain_gradients(lambda q, m=m, k=k[i], v=v[i]: loss(q, k, v, m), q[i])[0] for i, m in enumerate(seen)]
    near(vmap(grad(loss))(q, k, v, seen), torch.stack(each))
    near(vmap(run, (0, 0, 0, None))(q, k, v, seen[0])[1][2], run(q[2], k[2], v[2], seen[0])[1])


def test_bias_and_parameters_of_each_sample_or_of_all():
    q, k, v = samples()
    bias = torch.randn(SAMPLES, 2, 5, 5, dtype=q.dtype)
    run = called("tiles")

    def loss(q, bias):
        return run(q, k[0], v[0], rpb=bias).sin().sum()

    near(vmap(loss)(q, bias), torch.stack([loss(*each) for each in zip(q, bias, strict=True)]))
    for shared in (True, False):
        biases = [bias[0]] * SAMPLES if shared else bias
        found = vmap(grad(loss, (0, 1)), (0, None if shared else 0))(q, bias[0] if shared else bias)
        each = [plain_gradients(loss, *own) for own in zip(q, biases, strict=True)]
        for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
            near(ours, torch.stack(theirs))

    def pooled(weight):
        return called("pooled", parameters={"pool_weight": weight})(q[0], k[0], v[0]).sin().sum()

    weight = torch.rand(2, 2, dtype=q.dtype)
    near(grad(pooled)(weight), plain_gradients(pooled, weight)[0])


def test_vjp_and_jacobians():
    q, k, v = (t[0, :1] for t in samples())
    run = called("tiles")
    out, back = vjp(run, q, k, v)
    (theirs,) = plain_gradients(lambda q: (run(q, k, v) * out).sum(), q)
    near(back(out)[0], theirs)
    jacobian = jacrev(run)(q, k, v)
    near(torch.einsum("bshd,bshdcteg->cteg", out, jacobian), theirs)
    near(functionalize(run)(q, k, v), run(q, k, v))


@pytest.mark.parametrize("side", [6, 48])
def test_what_is_refused_is_refused_on_every_grid(side):
    layout = Layout((side, side))
    q = torch.randn(1, layout.length, 1, 8)

    def run(q):
        return visattn.attention(q, q, q, "na(window=5)", layout)

    with pytest.raises(ValueError, match=r"no forward-mode derivatives .*: use grad, vjp or jacrev"):
        jvp(run, (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivatives"):
        run(forward_ad.make_dual(q, q))
    with forward_ad.dual_level():
        assert torch.equal(run(q), run(q))
    with pytest.raises(ValueError, match=r"first derivatives of attention\(\) only.*create_graph=True"):
        jacrev(grad(lambda q: run(q).sum()))(q[:, :, :, :])
    with pytest.raises(ValueError, match="grid 6x5 has 30 tokens but q has"):
        vmap(lambda q: visattn.attention(q, q, q, "dense", Layout((6, 5))))(q[None])


def test_an_empty_batch():
    q, k, v = samples()
    assert vmap(called("tiles"))(q[:, :0], k[:, :0], v[:, :0]).shape == (SAMPLES, 0, LAYOUT.length, 2, 6)


def test_per_sample_gradients_of_a_model():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3, embed_dim=48, num_heads=2)
    images, labels = torch.randn(SAMPLES, 3, 64, 64), torch.tensor([0, 2, 1])
    weights = dict(model.named_parameters())

    def loss(weights, image, label):
        logits = torch.func.functional_call(model, weights, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    with visattn.apply(model, "na(window=3)", backend="tiles"):
        found = vmap(grad(loss), (None, 0, 0))(weights, images, labels)["blocks.0.attn.qkv.weight"]
        for i in range(SAMPLES):
            own = torch.autograd.grad(loss(weights, images[i], labels[i]), weights["blocks.0.attn.qkv.weight"])[0]
            assert (found[i] - own).abs().max() < 1e-5


def test_the_patterns_here_are_of_every_kind():
    kinds = {kind for text, _ in CALLS.values() for kind in type(parse(text)).__mro__}
    names = {kind.__name__ for kind in kinds}
    assert {"SpannedPattern", "PooledPattern", "RoutedPattern", "ComposedPattern"} <= names
