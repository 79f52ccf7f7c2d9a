"""What unlisted blocks give beside pooled keys: slope, linear and coarse rests."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import fill_value, make_input
from tests.support.cases import gradients, layouts, qkv
from tests.support.golden import golden_inputs, near
from visattn import Layout, attention, attention_rows, parse
from visattn.patterns.choice.blocks import token_blocks

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_rests.pt", weights_only=True)
FRONT = {"slope": "mean", "linear": "drop", "coarse": "drop"}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['rest']} {case['grid']}")
def test_adds_what_the_published_method_adds(case):
    heads, dim = case["shape"][2:]
    q, k, v = golden_inputs(case)
    pattern, layout, parameters = parse(case["pattern"]), Layout(tuple(case["grid"])), {}
    if case["rest"] == "linear":
        names = {"weight": "proj_l.weight", "bias": "proj_l.bias"}
        parameters = {n: fill_value(name, tuple(case["parameters"][name])) for n, name in names.items()}
    for backend in ("reference", "tiles"):
        if case["rest"] != "coarse":
            out = attention(q, k, v, pattern, layout, backend=backend, parameters=parameters)
            assert near(out, case["output"])
            continue
        # The original's gate is one number per token and channel.
        plain = attention(q, k, v, pattern, layout, backend=backend)
        ones = {"gate": torch.ones(heads, dim)}
        added = attention(q, k, v, pattern, layout, backend=backend, parameters=ones) - plain
        assert near(plain + added * make_input(case["shape"], 10 * case["seed"] + 9), case["output"])
        blocks = pattern.blocks(layout.grid)
        rows = token_blocks(blocks.grid, blocks.queries, q.device)
        first = torch.tensor([int((rows == i).nonzero()[0, 0]) for i in range(blocks.rows)])
        assert near(added[:, first].transpose(1, 2), case["coarse"])


def added_by_hand(rest, q, k, v, pattern, layout, valid, parameters, scale):
    """What is added to the output of grid queries, written out for one sample and head."""
    blocks, at = pattern.blocks(layout.grid), slice(layout.prefix, layout.prefix + layout.tokens)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    listed = pattern.front.choose(q, k, layout, None if valid.all() else valid, scale).mask(0, blocks.columns)
    out, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for b in range(len(q)):
        ok = valid[b, at]
        for h in range(q.shape[2]):
            query, key, value = q[b, at, h], k[b, at, h // group], v[b, at, h // group]
            means = {}
            for j in range(blocks.columns):
                inside = (columns == j) & ok
                if inside.any():
                    means[j] = key[inside].mean(0), value[inside].mean(0), int(inside.sum())
            if rest == "linear":
                feature = key.softmax(-1)[ok]
                f = query.softmax(-1)
                found = f @ (feature.T @ value[ok]) / (1e-5 + f @ feature.sum(0))[:, None]
                out[b, at, h] = found @ parameters["weight"].T + parameters["bias"]
            if not means:
                continue
            if rest == "coarse":
                for i in range(blocks.rows):
                    inside = (rows == i) & ok
                    mean = query[inside].sum(0) / max(1, int(inside.sum()))
                    keys, values = (torch.stack([m[n] for m in means.values()]) for n in (0, 1))
                    found = (keys @ mean * scale).softmax(0) @ values * parameters["gate"][h]
                    out[b, at, h] = torch.where((rows == i)[:, None], found, out[b, at, h])
            if rest == "slope":
                moment = sum(
                    torch.outer(key[t] - means[int(columns[t])][0], value[t]) for t in ok.nonzero()[:, 0].tolist()
                )
                for t in range(layout.tokens):
                    kept = [j for j in means if listed[b, min(h, listed.shape[1] - 1), rows[t], j]]
                    own = torch.isin(columns, torch.tensor(kept, dtype=torch.int64)) & ok
                    text = valid[b].clone()
                    text[at] = False
                    seen = torch.cat([key[own], k[b, text, h // group]]) @ query[t] * scale
                    extra = [means[j][2] * torch.exp(means[j][0] @ query[t] * scale) for j in means if j not in kept]
                    if extra:
                        share = sum(extra) / (seen.exp().sum() + sum(extra))
                        out[b, layout.prefix + t, h] = share * scale / int(ok.sum()) * (query[t] @ moment)
    return out


@settings(deadline=None, max_examples=9)
@given(
    layout=layouts(sides=(14, 5, 3)),
    rest=st.sampled_from(sorted(FRONT)),
    rule=st.sampled_from(["topk(keep=0.3", "topp(p=0.5", "above(tau=0.2, share=all"]),
    kv_heads=st.sampled_from([1, 2]),
    masked=st.booleans(),
)
def test_outputs_and_gradients_are_those_written_out(layout, rest, rule, kv_heads, masked):
    pattern = parse(f"{rule}, block={'x'.join(['2'] * layout.dims)}, rest={rest})")
    q, k, v = qkv(layout, 2, kv_heads, 4, batch=2, grad=True)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    if masked:
        valid = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7
    mask = valid if masked else None
    shapes = pattern.parameter_shapes(2, 4, layout.grid)
    generator = torch.Generator().manual_seed(1)
    parameters = {n: torch.randn(s, generator=generator, dtype=q.dtype).requires_grad_() for n, s in shapes.items()}
    front = attention(q, k, v, pattern.front, layout, key_mask=mask, backend="reference")
    expected = front + added_by_hand(rest, q, k, v, pattern, layout, valid, parameters, 0.5)
    inputs = (q, k, v, *parameters.values())
    wanted = gradients(expected, inputs)
    for backend in ("reference", "tiles"):
        out = attention(q, k, v, pattern, layout, key_mask=mask, backend=backend, parameters=parameters)
        assert (out - expected).abs().max() < 1e-9
        for a, b in zip(gradients(out, inputs), wanted, strict=True):
            assert (a - b).abs().max() < 1e-8


def test_a_rest_that_is_learned_adds_nothing_before():
    layout = Layout((6, 6), 2)
    q, k, v = qkv(layout, 2, dim=4)
    for rest in ("linear", "coarse"):
        pattern = parse(f"topk(keep=0.3, block=2x2, rest={rest})")
        assert pattern.learnable and not pattern.covers((2, 2))
        assert torch.equal(attention(q, k, v, pattern, layout), attention(q, k, v, pattern.front, layout))
    full = attention(q, k, v, "topk(keep=1.0, block=2x2, rest=slope)", layout, backend="tiles")
    assert (full - attention(q, k, v, "dense", layout)).abs().max() < 1e-10


def test_patched_models_train_and_keep_what_is_learned(tmp_path):
    pytest.importorskip("diffusers")
    from tests.support import tiny_models

    model, inputs = tiny_models.flux(single=1)
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "topk(keep=0.3, block=2x3, rest=coarse)", strict=True, backend="tiles") as handle:
        plain = tiny_models.run(model, inputs)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        found = [p for site in handle.parameters for p in handle.parameters[site].values()]
        assert found and all(p.grad is not None and p.grad.abs().sum() > 0 for p in found)
        with torch.no_grad():
            for p in found:
                p += 1
        changed = tiny_models.run(model, inputs)
        handle.save(tmp_path / "gates.safetensors")
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(tiny_models.run(model, inputs), stock)
    weights = tmp_path / "gates.safetensors"
    with visattn.apply(model, "topk(keep=0.3, block=2x3, rest=coarse)", weights=weights, backend="tiles"):
        torch.testing.assert_close(tiny_models.run(model, inputs), changed)


def test_what_cannot_be_is_refused():
    layout = Layout((4, 4))
    q, k, v = qkv(layout, 2, dim=4)
    for rest in FRONT:
        with pytest.raises(ValueError, match=r"adds something to its output that is no weight of a token"):
            attention_rows(q, k, f"topk(keep=0.5, block=2x2, rest={rest})", layout, [0])
    with pytest.raises(ValueError, match=r"weight is \[3, 3\] but .* takes \[4, 4\]"):
        attention(q, k, v, "topk(keep=0.5, block=2x2, rest=linear)", layout, parameters={"weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"skip=0.1 leaves what it passes over out"):
        parse("topk(rest=slope, skip=0.1)")
    with pytest.raises(ValueError, match=r"has parameters to train, which heads cannot have one by one"):
        parse("perhead(heads={0: topk(rest=linear)})")
