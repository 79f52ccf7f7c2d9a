"""Style injection: one sample of a batch attends to what another one shows, with queries that a third one had in part.

Chung, Hyun and Heo, Style Injection in Diffusion (https://arxiv.org/abs/2312.09008), sections 4.1 to 4.3. Samples are
[content, style, result]. Style keys do not sit where the content's queries do, so no local pattern can stand for such
a call: modules run dense where they inject.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from visattn.layout import Layout
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.run import Run
from visattn.runtime.runner import Runner

CONTENT, STYLE, RESULT = 0, 1, 2
# What reports say of calls that inject.
REASON = "style injection"


def adain(content: torch.Tensor, style: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Content [B, C, ...] with the mean and the deviation that each channel of the style has over space.

    Args:
        content: [B, C, ...].
        style: [B, C, ...].
        eps: Added to the content's deviation, for channels that are constant.
    """
    dims = tuple(range(2, content.ndim))
    (mean, spread), (to_mean, to_spread) = (
        (x.mean(dims, keepdim=True), x.std(dims, keepdim=True)) for x in (content, style)
    )
    return to_spread * (content - mean) / (spread + eps) + to_mean


def inject(call: AttentionCall, rows: slice, keys: torch.Tensor | None, gamma: float, temperature: float) -> Any:
    """What the queries of the result's grid get: [1, grid, H, D].

    Args:
        call: Samples [content, style, result]; [3, S, H, D].
        rows: Tokens of the grid. Keys and values beside them, of text, stay the result's own.
        keys: Valid keys [3, S], None for all.
        gamma: Share of the content's queries in the result's.
        temperature: Factor on the logits.
    """
    q = temperature * (gamma * call.q[CONTENT, rows] + (1 - gamma) * call.q[RESULT, rows])
    k, v = (x[RESULT].clone() for x in (call.k, call.v))
    k[rows], v[rows] = call.k[STYLE, rows], call.v[STYLE, rows]
    mask = None
    if keys is not None:
        mask = keys[RESULT].clone()
        mask[rows] = keys[STYLE, rows]
        mask = mask[None, None, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q.to(k.dtype), k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=call.factor, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


class Injection:
    """What stands for the attention of one module while styles are injected.

    Args:
        run: The state of the model.
        plain: What the module runs otherwise.
        gamma: Share of the content's queries.
        temperature: Factor on the logits.

    Attributes:
        calls: How many it stood in for.
    """

    def __init__(self, run: Run, plain: Runner, gamma: float, temperature: float) -> None:
        self._run, self._plain = run, plain
        self._gamma, self._temperature = gamma, temperature
        self.calls = 0

    def __call__(self, call: AttentionCall, site: str) -> torch.Tensor:
        """The output [3, S, H, D], the model's own but for the grid of the result.

        Raises:
            ValueError: If the call is not one of three samples on one grid.
        """
        layout = self._layout(call, site)
        keys = key_validity(call.mask, call.q, self._run.mask_row, call.k.shape[1])
        if isinstance(keys, str) or (keys is not None and keys.dtype != torch.bool):
            raise ValueError(f"style_transfer: {site} has a mask that says more than which keys are valid")
        out = self._plain.leave(call, site, REASON).clone()
        rows = slice(layout.prefix, layout.prefix + layout.tokens)
        out[RESULT, rows] = inject(call, rows, keys, self._gamma, self._temperature)[0].to(out.dtype)
        forward = self._run.forward
        if forward is not None:
            # Not what `strict` is to complain of.
            forward.excused.add(site)
        self.calls += 1
        return out

    def _layout(self, call: AttentionCall, site: str) -> Layout:
        forward = self._run.forward
        found = "called outside of the model's forward" if forward is None else forward.layouts(call.k.shape[1])
        if not isinstance(found, str) and len(set(found)) > 1:
            found = "its samples sit in different places"
        if not isinstance(found, str) and call.q.shape[1] != call.k.shape[1]:
            found = "it has keys beyond its queries"
        if not isinstance(found, str) and len(call.q) != 3:
            found = f"its batch is {len(call.q)} and not content, style and result"
        if isinstance(found, str):
            raise ValueError(f"style_transfer: {site} cannot take a style: {found}; leave it out of layers=")
        return next(iter(found))
