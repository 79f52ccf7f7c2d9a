"""The block stacks that steps are timed with: what they compute."""

import torch

from scripts.bench.stack_models import DoubleBlock, dense, rotated, turns


def test_rotary_positions_turn_pairs_of_channels():
    x = torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    by = torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * by).flatten(-2)
    torch.testing.assert_close(rotated(x, turns(9, 8, "cpu")), expected)


def test_positions_of_joined_streams_go_on():
    """Text has the first positions, the image those behind it: its keys are turned before they are joined."""
    seen = []

    def attend(q, k, v):
        seen.extend((q, k))
        return dense(q, k, v)

    torch.manual_seed(0)
    block, turn = DoubleBlock(16, 2, 2), turns(5, 8, "cpu")
    nowhere = torch.tensor([1.0, 0.0])[:, None, None, None].expand_as(turn)
    with torch.no_grad():
        text, x, vector = torch.randn(1, 2, 16), torch.randn(1, 3, 16), torch.randn(1, 16)
        for where in (turn, nowhere):
            block(x, text, vector, where, attend)
    q, k, plain_q, plain_k = seen
    torch.testing.assert_close(q, rotated(plain_q, turn))
    torch.testing.assert_close(k, rotated(plain_k, turn))
