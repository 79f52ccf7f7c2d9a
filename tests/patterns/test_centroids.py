"""Attention inside clusters around trained centroids."""

from pathlib import Path

import pytest
import torch

from tests.golden.fill import make_input
from tests.support.cases import gradients, qkv
from tests.support.golden import golden_inputs, near
from visattn import Layout, attention, attention_rows, parse
from visattn.patterns.centroids import followed

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_centroids.pt", weights_only=True)[0]
LAYOUT = Layout((4, 6), 2, 1)
TEXT = "centroids(clusters=3, window=7)"


def test_is_what_the_routing_transformer_gives():
    _, length, heads, dim = GOLDEN["shape"]
    q, k, v = golden_inputs(GOLDEN, run=8)
    given = {"centroids": make_input((heads, 4, dim), GOLDEN["seed"])}
    out = attention(q, k, v, GOLDEN["pattern"], Layout(length), parameters=given)
    assert near(out, GOLDEN["output"])


@pytest.mark.parametrize("masked", [False, True])
def test_clusters_attend_by_themselves_and_text_joins_each(masked):
    q, k, v = qkv(LAYOUT, 2, 1, 6, batch=2, grad=True)
    key_mask = torch.rand(2, LAYOUT.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    shown = torch.ones(2, LAYOUT.length, dtype=torch.bool) if key_mask is None else key_mask
    centroids = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    text = [0, 1, 26]
    rows = []
    for b in range(2):
        for h in range(2):
            near = [
                torch.cosine_similarity(x[b, 2:26, i][None], centroids[h][:, None], 2).masked_fill(~shown[b, 2:26], -9)
                for x, i in ((q, h), (k, 0))
            ]
            total, number = (torch.zeros(24, n, dtype=torch.float64) for n in (27, 1))
            logits = q[b, :, h] @ k[b, :, 0].T * 6**-0.5
            for c in range(3):
                own, keys = (side[c].argsort(descending=True, stable=True)[:7] for side in near)
                seen = [j for j in [*(keys + 2).tolist(), *text] if shown[b, j]]
                weights = torch.zeros(7, 27, dtype=torch.float64)
                weights[:, seen] = logits[own + 2][:, seen].softmax(1)
                total, number = total.index_add(0, own, weights), number.index_add(0, own, torch.ones(7, 1).double())
            whole = logits.masked_fill(~shown[b], -1e30).softmax(1)
            rows.append(torch.cat([whole[:2], total / (number + 1e-5), whole[26:]]))
    weights = torch.stack(rows).view(2, 2, 27, 27)
    expected = torch.einsum("bhrs,bshd->brhd", weights, v.repeat_interleave(2, 2))
    given = {"centroids": centroids}
    out = attention(q, k, v, TEXT, LAYOUT, key_mask=key_mask, parameters=given)
    assert (out - expected).abs().max() < 1e-10
    for a, b in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-10
    found = attention_rows(q, k, TEXT, LAYOUT, torch.arange(27), key_mask=key_mask, parameters=given)
    assert (found - weights).abs().max() < 1e-10
    assert (weights.sum(-1) == 0).any(), "some query is in no cluster"
    alone = attention(q[1:], k[1:], v[1:], TEXT, LAYOUT, key_mask=shown[1:] if masked else None, parameters=given)
    assert (alone - out[1:]).abs().max() < 1e-10


def test_without_centroids_it_is_refused():
    q, k, v = qkv(LAYOUT, 2, dim=6)
    with pytest.raises(ValueError, match="around trained centroids, and they are missing: pass parameters="):
        attention(q, k, v, TEXT, LAYOUT)
    with pytest.raises(ValueError, match="has no log-sum-exp"):
        attention(q, k, v, TEXT, LAYOUT, parameters=parse(TEXT).initial_parameters(2, 6, (4, 6)), return_lse=True)
    for text in ("centroids(clusters=0)", "centroids(window=2x2)"):
        with pytest.raises(ValueError, match="whole number"):
            parse(text)


def test_centroids_follow_what_is_nearest():
    layout = Layout(40, 3)
    directions = torch.nn.functional.normalize(torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]]), dim=2)
    q, k, _ = qkv(layout, 1, dim=4, dtype=torch.float32)
    q[:, 3:23], q[:, 23:] = torch.tensor([5.0, 1, 0, 0]), torch.tensor([0, 0.1, 0.1, 0])
    k[:, 3:], k[:, :3], q[:, :3] = q[:, 3:], 100, 100
    # The third is nearest to nobody.
    once = followed(directions, q, k, layout, decay=0.0)
    wanted = torch.nn.functional.normalize(torch.tensor([[5.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]), dim=1)
    assert (once[0] - wanted).abs().max() < 1e-6
    assert (followed(directions, q, k, layout, decay=1.0) - directions).abs().max() < 1e-6
    hidden = torch.ones(1, 43, dtype=torch.bool)
    hidden[:, 3:23] = False
    assert torch.equal(followed(directions, q, k, layout, 0.0, hidden)[0, 0], directions[0, 0])
    with pytest.raises(ValueError, match="decay=2 must be a share"):
        followed(directions, q, k, layout, 2)
    with pytest.raises(ValueError, match=r"must be \[H, clusters, D\] of queries"):
        followed(directions[:, :, 1:], q, k, layout)
    with pytest.raises(ValueError, match=r"must have the .* tokens of"):
        followed(directions, q[:, 1:], k[:, 1:], layout)
