"""The definition of a neighborhood window, token by token."""

import torch


def window_mask(grid, window, prefix, suffix):
    """Which keys a query sees, by the definition: a window around it per axis, shifted inward at borders."""
    axes = []
    for n, w in zip(grid, window, strict=True):
        axis = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            start = min(max(i - w // 2, 0), max(n - w, 0))
            axis[i, start : start + w] = True
        axes.append(axis)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        mask = torch.kron(mask, axis)
    tokens = len(mask)
    full = torch.ones(prefix + tokens + suffix, prefix + tokens + suffix, dtype=torch.bool)
    full[prefix : prefix + tokens, prefix : prefix + tokens] = mask
    return full
