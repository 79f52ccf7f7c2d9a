"""Blocks that an online softmax passes over: the test, block by block, what it costs, and who is told."""

import json
import math

import pytest
import torch

from tests.support.cases import qkv
from visattn import Layout, apply, attention, parse, tile_choice
from visattn.patterns.choice.blocks import token_blocks
from visattn.patterns.choice.listening import listening


def by_hand(q, k, pattern, layout, valid, below):
    """The loop of a kernel, one block after the other, for one sample."""
    blocks = pattern.blocks(layout.grid)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    at = slice(layout.prefix, layout.prefix + layout.tokens)
    plain = parse(str(pattern).replace(f", skip={below}", ""))
    listed = plain.choose(q, k, layout, None if valid.all() else valid).mask(0, blocks.columns)[0].clone()
    group = q.shape[2] // k.shape[2]
    text = torch.ones(layout.length, dtype=torch.bool)
    text[at] = False
    for head in range(q.shape[2]):
        logits = q[0, :, head] @ k[0, :, head // group].T * q.shape[3] ** -0.5
        for i in range(blocks.rows):
            mine = logits[at][(rows == i) & valid[0, at]]
            seen = mine[:, text & valid[0]]
            largest = torch.full((len(mine),), -math.inf, dtype=q.dtype)
            if seen.shape[1]:
                largest = torch.maximum(largest, seen.amax(1))
            for j in range(blocks.columns):
                keys = mine[:, at][:, (columns == j) & valid[0, at]]
                if not listed[head, i, j] or not keys.shape[1]:
                    listed[head, i, j] &= len(mine) > 0 and keys.shape[1] > 0
                    continue
                largest = torch.maximum(largest, keys.amax(1))
                if bool(((keys.amax(1) - largest).exp() < below).all()):
                    listed[head, i, j] = False
    return listed


@pytest.mark.parametrize("layout", [Layout((5, 7), 3, 2), Layout(44)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_skips_what_the_loop_of_a_kernel_skips(layout, masked):
    q, k, v = qkv(layout, 4, 2, dim=6)
    q = 3 * q
    valid = torch.ones(1, layout.length, dtype=torch.bool)
    if masked:
        valid[0, 6:20] = False
    block = "2x3" if layout.dims == 2 else "8"
    for rule in ("topk(keep=1.0", "topk(keep=0.6", "above(tau=-0.5"):
        pattern = parse(f"{rule}, block={block}, always=none, skip=0.2)")
        mask = None if valid.all() else valid
        blocks = pattern.blocks(layout.grid)
        found = pattern.choose(q, k, layout, mask).mask(0, blocks.columns)[0]
        expected = by_hand(q, k, pattern, layout, valid, 0.2)
        # A block without valid queries or keys changes no output.
        rows, columns = (
            torch.zeros(number, dtype=torch.int64).index_add(
                0,
                token_blocks(blocks.grid, box, q.device),
                valid[0, layout.prefix : layout.prefix + layout.tokens].long(),
            )
            for number, box in ((blocks.rows, blocks.queries), (blocks.columns, blocks.keys))
        )
        assert torch.equal(found[:, rows > 0][:, :, columns > 0], expected[:, rows > 0][:, :, columns > 0])
        outs = [attention(q, k, v, pattern, layout, key_mask=mask, backend=b) for b in ("reference", "tiles", "sdpa")]
        assert all((out - outs[0]).abs().max() < 1e-10 for out in outs[1:])


def test_what_is_skipped_is_little_and_the_error_is_bounded():
    layout = Layout((8, 8), 2)
    q, k, v = qkv(layout, 2, dim=8)
    dense = attention(2 * q, k, v, "dense", layout)
    before = 1.0
    for below in (0.5, 0.1, 0.01, 1e-6):
        text = f"topk(keep=1.0, always=none, block=2x2, skip={below!r})"
        shares, skips = [], []
        with listening(shares.append, skips.append):
            out = attention(2 * q, k, v, text, layout, backend="reference")
        skipped = skips[-1].mean().item()
        assert torch.allclose(shares[-1] + skips[-1], torch.ones_like(shares[-1]))
        assert skipped <= before
        # A skipped token has less than `below` of the largest weight, and at most all tokens of the grid are skipped.
        lost = below * layout.tokens / (1 + below * layout.tokens)
        bound = 2 * lost * v.abs().amax(1, keepdim=True)
        assert ((out - dense).abs() <= bound).all()
        before = skipped
    assert before == 0 and (out - dense).abs().max() < 1e-12


def test_the_report_counts_what_is_skipped():
    pytest.importorskip("diffusers")
    from tests.support import tiny_models

    model, inputs = tiny_models.flux(single=1)
    with apply(model, "topk(keep=1.0, block=2x3, skip=0.7)", strict=True, backend="tiles") as handle:
        tiny_models.run(model, inputs)
        report = handle.report()
    for site in report.modules:
        (call,) = site.calls
        assert call.skipped is not None and call.skipped > 0
        assert call.skipped + call.density == pytest.approx(1.0)
    skipped = [site.calls[0].skipped for site in report.modules]
    assert f"{sum(skipped) / len(skipped):.3f} skipped" in " ".join(str(report).split())
    assert json.loads(json.dumps(report.to_dict()))["sites"][-1]["calls"][0]["skipped"] == call.skipped


def test_what_cannot_be_is_refused():
    layout = Layout((4, 4))
    q, k, v = qkv(layout, 1, dim=4, grad=True)
    with pytest.raises(ValueError, match=r"skip passes over depends on the order of the blocks and has no gradient"):
        attention(q, k, v, "topk(keep=1.0, block=2x2, skip=0.1)", layout)
    with torch.no_grad():
        attention(q, k, v, "topk(keep=1.0, block=2x2, skip=0.1)", layout)
    for text, message in (
        ("topk(skip=1.0)", "skip=1.0 must be a share of the largest weight, from 0 to below 1"),
        ("topk(skip=-0.1)", "skip=-0.1 must be"),
        ("topp(skip=0.1, rest=mean)", "skip=0.1 leaves what it passes over out: leave rest=mean out, or skip"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)
    assert not parse("topk(keep=1.0, skip=0.1)").covers((4, 4))
    assert tile_choice(q.detach(), k.detach(), "topk(keep=1.0, block=2x2, skip=0.5)", layout).any()
