"""What denoising steps share, by hand: models that are not patched, whose calls of torch's attention keep in a dict."""

from contextlib import contextmanager

import torch

from visattn import dense_mask


class ByHand:
    """Stands for torch's attention.

    Args:
        kind: "residual" or "broadcast".
        every: Steps from one refresh to the next.
        layouts: Where tokens sit, of the calls that are of the pattern.
        of: The pattern inside, which the grid decides; None for dense attention.
        halves: Forwards of a step.

    Attributes:
        refreshed: Steps of the calls that computed anew.
        shared: Steps of the others.
    """

    def __init__(self, kind, every, layouts, of=None, halves=1):
        self.kind, self.every, self.halves = kind, every, halves
        self.seen = {each.length: None if of is None else dense_mask(of, each) for each in layouts}
        self.refreshed, self.shared = [], []
        self.begin()

    def begin(self):
        """Another run."""
        self.kept, self.forwards, self.call = {}, 0, 0

    def enters(self, model, *_):
        """A forward of a model begins."""
        self.model, self.call, self.forwards = id(model), 0, self.forwards + 1

    def __call__(self, query, key, value, attn_mask=None, *rest, **options):
        length = query.shape[2]
        if length not in self.seen or key.shape[2] != length:
            return self.real(query, key, value, attn_mask, *rest, **options)
        assert attn_mask is None
        dense, inside = (self.real(query, key, value, mask, *rest, **options) for mask in (None, self.seen[length]))
        step, half = divmod(self.forwards - 1, self.halves)
        at, self.call = (self.model, half, self.call), self.call + 1
        if at not in self.kept or step - self.kept[at][0] >= self.every:
            self.refreshed.append(step)
            left = dense - inside if self.kind == "residual" else inside
            self.kept[at] = step, left
            return dense if self.kind == "residual" else inside
        self.shared.append(step)
        left = self.kept[at][1]
        return inside + left if self.kind == "residual" else left

    @contextmanager
    def attending(self, *models):
        """Inside, models attend by hand."""
        self.real = torch.nn.functional.scaled_dot_product_attention
        hooks = [model.register_forward_pre_hook(self.enters) for model in models]
        torch.nn.functional.scaled_dot_product_attention = self
        try:
            yield self
        finally:
            torch.nn.functional.scaled_dot_product_attention = self.real
            for hook in hooks:
                hook.remove()
