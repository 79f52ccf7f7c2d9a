"""Keys on other grids, rings, and values of another width, in Triton's interpreter: dense attention under the mask."""

from hypothesis import given, settings

from tests.support.cases import gradients
from tests.support.geometry import problems
from tests.support.oracles import dense_attention
from visattn import attention


@settings(max_examples=5)
@given(problems(sides=(10, 4, 3), widths=(16, 32), batch=1))
def test_the_kernels_are_dense_attention_under_the_mask(problem):
    pattern, layout, inputs, valid, seen = problem
    leaves = [t.detach().float().requires_grad_() for t in inputs]
    out = attention(*leaves, pattern, layout, key_mask=valid, backend="triton")
    expected = dense_attention(*inputs, seen, inputs[0].shape[-1] ** -0.5)
    assert (out - expected).abs().max() < 1e-5
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-4
