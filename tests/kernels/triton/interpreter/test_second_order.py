"""Second derivatives of the Triton engines where everything after the attention is linear."""

import pytest
import torch

from tests.support.cases_triton import tensors
from tests.support.derivatives import derivatives
from visattn import Layout
from visattn.kernels.agent.attention import through_agents
from visattn.kernels.linear.plain import plain_attention
from visattn.kernels.triton.agent.attention import agent_attention
from visattn.kernels.triton.linear.attention import linear_attention


def compare(ours, truth, limit=2e-5):
    assert len(ours) == len(truth)
    for a, b in zip(ours, truth, strict=True):
        assert b.norm() > 0
        assert (a.double() - b).norm() / b.norm() < limit


@pytest.mark.parametrize(
    ("pattern", "layout", "scale", "special"),
    [
        ("na(window=3)", Layout((4, 5), 1, 2), None, {"rpb": "na(window=3)", "heads": 2, "kv_heads": 1}),
        ("clear(radius=2,pool=2)", Layout((4, 5), 1), None, {"masked": True, "batch": 2}),
        ("routing(regions=2,topk=1)", Layout((4, 5), 1), -0.3, {}),
        ("topp(p=0.5,block=2x3)", Layout((4, 5), 1), -0.3, {"heads": 4, "kv_heads": 2, "batch": 2}),
    ],
)
def test_tile_lists(pattern, layout, scale, special):
    inputs, mask = tensors(layout, dim=8, **special)
    compare(
        derivatives(inputs, pattern, layout, "triton", key_mask=mask, scale=scale),
        derivatives([t.double() for t in inputs], pattern, layout, "reference", key_mask=mask, scale=scale),
    )


def second(run, inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)]


@pytest.mark.parametrize("feature", ["elu", "relu", "given"])
def test_linear(feature):
    inputs, mask = tensors(Layout(20), heads=2, kv_heads=1, dim=16, batch=2, masked=True)
    if feature == "given":
        inputs = [*(t.softmax(-1) for t in inputs[:2]), inputs[2]]
    compare(
        second(lambda *t: linear_attention(*t, mask, feature), inputs),
        second(lambda *t: plain_attention(*t, feature, mask), [t.double() for t in inputs]),
    )


def test_agents():
    inputs, mask = tensors(Layout(20), heads=2, dim=16, batch=2, masked=True)
    agents = inputs[0][:, :5] + 1
    there = torch.tensor([[True] * 5, [True, False, True, True, False]])

    def run(attend):
        def of(q, agents, k, v):
            # Agents are computed from the queries: the gradients of the two stay apart.
            return attend(q, agents + q[:, 5:10], k, v)

        return of

    q, k, v = inputs
    compare(
        second(run(lambda *t: agent_attention(*t, mask, there, 0.3, through_agents)), (q, agents, k, v)),
        second(run(lambda *t: through_agents(*t, mask, there, 0.3)), [t.double() for t in (q, agents, k, v)]),
    )
