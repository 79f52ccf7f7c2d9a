"""Efficient probing: the published implementation's outputs, and a probe that learns what tokens hold."""

from pathlib import Path

import pytest
import timm
import torch

from visattn.models.probe import EfficientProbe, halves, tokens_of, train

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "probe.pt", weights_only=True)


def test_outputs_are_those_of_the_published_implementation():
    x, queries, d_out = GOLDEN["x"], int(GOLDEN["queries"]), int(GOLDEN["d_out"])
    probe = EfficientProbe(x.shape[2], queries, d_out).double()
    probe.load_state_dict(GOLDEN["state"])
    torch.testing.assert_close(probe(x), GOLDEN["out"], rtol=1e-12, atol=1e-12)
    # Another way: whole maps, group by group.
    values = (x @ probe.v.weight.T).chunk(queries, 2)
    whole = torch.cat([probe.maps(x)[:, m, None] @ values[m] for m in range(queries)], 2)[:, 0]
    torch.testing.assert_close(probe(x), whole)
    assert sum(p.numel() for p in probe.parameters()) == queries * 32 + 32 * 32 // d_out


def tokens(seed, count=120):
    """One token of each sample says its class, by its direction; where it sits differs."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=draw)
    x = torch.randn(count, 9, 16, generator=draw)
    where = torch.randint(0, 9, (count,), generator=draw)
    x[torch.arange(count), where] += 8 * torch.eye(16)[labels + 1] + 8 * torch.eye(16)[0]
    return x, labels


def test_a_probe_finds_the_token_that_tells_the_class():
    found = train(*tokens(0), tokens(1), queries=4, epochs=30, batch=40, rate=8.0)
    assert found.accuracy > 0.9 and found.loss < 0.5
    again = train(*tokens(0), tokens(1), queries=4, epochs=30, batch=40, rate=8.0)
    assert again.loss == found.loss
    maps = found.classifier.probe.maps(tokens(1)[0])
    torch.testing.assert_close(maps.sum(-1), torch.ones(120, 4))


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="queries=5 must divide"):
        EfficientProbe(32, 5)
    with pytest.raises(ValueError, match="two classes of two each"):
        halves(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="two labelled images"):
        train(torch.zeros(1, 2, 4), torch.zeros(1), (torch.zeros(1, 2, 4), torch.zeros(1)))
    first, second = halves(torch.tensor([0, 1, 0, 1, 1]))
    assert first.tolist() == [0, 1, 4] and second.tolist() == [2, 3]


def test_tokens_are_those_of_the_grid():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(tokens_of(vit, x.split(2)), vit.forward_features(x)[:, 1:].detach())
    assert tokens_of(timm.create_model("resnet10t").eval(), [x]).shape == (3, 1, 512)
