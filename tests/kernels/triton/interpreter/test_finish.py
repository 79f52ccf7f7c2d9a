"""The last kernel of Hopper's one-pass backward, the only one of them that the interpreter can run."""

import torch

from visattn.kernels.triton.hopper.one_pass import finish


def test_sums_of_query_tiles_become_gradients_of_their_tokens():
    batch, heads, tiles, columns, dim = 2, 3, 2, 16, 16
    # Slots without a token in both tiles, and one token, a dense one, in none.
    tokens = torch.full((tiles, columns), -1, dtype=torch.int32)
    tokens[0, :5], tokens[1, 2:9] = torch.tensor([7, 1, 2, 9, 4]), torch.tensor([12, 3, 5, 6, 8, 10, 11])
    length = 13
    sums = torch.randn(batch * heads * tiles * columns, dim)
    grad = torch.full((batch, length, heads, dim), 5.0)
    # As in a launch, all programs are in the first axis.
    finish[(batch * heads * tiles,)](sums, tokens, grad, 0.5, tiles, length, heads, HEAD_DIM=dim, COLUMNS=columns)
    expected = torch.full_like(grad, 5.0)
    parts = 0.5 * sums.view(batch, heads, tiles, columns, dim)
    for tile, slot in (tokens >= 0).nonzero().tolist():
        expected[:, tokens[tile, slot]] = parts[:, :, tile, slot]
    torch.testing.assert_close(grad, expected)
