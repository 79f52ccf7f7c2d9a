"""Style injection: attention to what a style's picture shows, with queries that another picture's content had in part.

Chung, Hyun and Heo, Style Injection in Diffusion (https://arxiv.org/abs/2312.09008), sections 4.1 to 4.3. Content and
style are samples of the same batch, or features that an earlier run left. Style keys do not sit where the content's
queries do, so no local pattern can stand for such a call: modules run dense where they inject.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from visattn.layout import Layout
from visattn.pipelines.control.features import Features, Source
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.run import Run
from visattn.runtime.runner import Runner
from visattn.runtime.sequences import with_queries

CONTENT, STYLE, RESULT = 0, 1, 2
# What a batch of so many samples is.
SAMPLES = {1: "the result", 2: "content and style", 3: "content, style and result"}
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


class Where(NamedTuple):
    """Where a call's tokens are.

    Attributes:
        queries: Those of the grid.
        rows: Keys of the grid; others are text.
        keys: Valid keys [B, S], None for all.
    """

    queries: slice
    rows: slice
    keys: torch.Tensor | None


def source_of(call: AttentionCall, where: Where) -> Source:
    """What samples [content, style, ...] of a call give to others."""
    keys = None if where.keys is None else where.keys[STYLE, where.rows]
    return Source(call.q[CONTENT, where.queries], call.k[STYLE, where.rows], call.v[STYLE, where.rows], keys)


def inject(
    call: AttentionCall, sample: int, where: Where, source: Source, gamma: float, temperature: float
) -> torch.Tensor:
    """What the queries of a sample's grid get: [grid, H, D].

    Args:
        call: A call whose tensors are [B, S, H, D].
        sample: Which of its samples. Its keys and values beside the grid, of text, stay its own.
        where: Its tokens.
        source: Content and style.
        gamma: Share of the content's queries in the sample's.
        temperature: Factor on the logits.
    """
    rows = where.rows
    q = temperature * (gamma * source.q + (1 - gamma) * call.q[sample, where.queries])
    k, v = (x[sample].clone() for x in (call.k, call.v))
    k[rows], v[rows] = source.k, source.v
    mask = None
    if where.keys is not None:
        mask = where.keys[sample].clone()
        if source.keys is not None:
            mask[rows] = source.keys
        mask = mask[None, None, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q.to(k.dtype), k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.factor, enable_gqa=grouped)[0].transpose(
        0, 1
    )


class Injection:
    """What stands for the attention of one module while styles are injected.

    Args:
        run: The state of the model.
        plain: What the module runs otherwise.
        gamma: Share of the content's queries.
        temperature: Factor on the logits.
        features: What an earlier run left of content and style; None where they are samples of the batch.

    Attributes:
        calls: How many it stood in for.
    """

    def __init__(
        self, run: Run, plain: Runner, gamma: float, temperature: float, features: Features | None = None
    ) -> None:
        self._run, self._plain = run, plain
        self._gamma, self._temperature, self._features = gamma, temperature, features
        self.calls = 0

    def __call__(self, call: AttentionCall, site: str) -> torch.Tensor:
        """The output [B, S, H, D], the model's own but for the grid of the result.

        Raises:
            ValueError: If the call is not one of such samples on one grid.
        """
        stored = self._features is not None
        sample = 0 if stored else RESULT
        where = find_grid(self._run, self._plain, call, site, sample + 1)
        source = self._features.of(site) if self._features is not None else source_of(call, where)
        if len(source.q) != where.queries.stop - where.queries.start:
            raise ValueError(f"style_transfer: {site} has another grid than when content and style were stored")
        out = leave(self._run, self._plain, call, site).clone()
        out[sample, where.queries] = inject(call, sample, where, source, self._gamma, self._temperature).to(out.dtype)
        self.calls += 1
        return out


class Recording:
    """What stands for the attention of one module while content and style are stored: dense, as beside the result.

    Args:
        run: The state of the model.
        plain: What the module runs.
        features: Where they go.
    """

    def __init__(self, run: Run, plain: Runner, features: Features) -> None:
        self._run, self._plain, self._features = run, plain, features

    def __call__(self, call: AttentionCall, site: str) -> torch.Tensor:
        """The output [2, S, H, D].

        Raises:
            ValueError: If the call is not one of two samples on one grid, or there is too much to store.
        """
        where = find_grid(self._run, self._plain, call, site, STYLE + 1)
        self._features.keep(site, source_of(call, where))
        return leave(self._run, self._plain, call, site)


def leave(run: Run, plain: Runner, call: AttentionCall, site: str) -> torch.Tensor:
    """What the model itself makes of a call, counted as style injection."""
    out = plain.leave(call, site, REASON)
    if run.forward is not None:
        # Not what `strict` is to complain of.
        run.forward.excused.add(site)
    return out


def find_grid(run: Run, plain: Runner, call: AttentionCall, site: str, samples: int) -> Where:
    """Where the tokens of a call of so many samples are.

    Raises:
        ValueError: If they are not the samples that are expected, on one grid.
    """
    found = plain.places(call)
    if not isinstance(found, str) and len(set(found)) > 1:
        found = "its samples sit in different places"
    elif len(call.q) != samples:
        found = f"its batch is {len(call.q)} and not {SAMPLES[samples]}"
    of_queries = found
    if not isinstance(found, str) and call.q.shape[1] < call.k.shape[1]:
        of_queries = with_queries(call.q.shape[1], found[:1])
    if isinstance(found, str) or isinstance(of_queries, str):
        why = found if isinstance(found, str) else of_queries
        raise ValueError(f"style_transfer: {site} cannot take a style: {why}; leave it out of layers=")
    keys = key_validity(call.mask, call.q, run.mask_row, call.k.shape[1])
    if isinstance(keys, str) or (keys is not None and keys.dtype != torch.bool):
        raise ValueError(f"style_transfer: {site} has a mask that says more than which keys are valid")
    return Where(_grid(next(iter(of_queries))), _grid(next(iter(found))), keys)


def _grid(layout: Layout) -> slice:
    """Tokens of the grid."""
    return slice(layout.prefix, layout.prefix + layout.tokens)
