"""The kernels beside the tile lists (linear and agent attention, routing) on a small problem, for `resources`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from visattn.kernels.triton.agent import attention as agent
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.config import DIRECTIONS, Config, config
from visattn.kernels.triton.linear import attention as linear
from visattn.kernels.triton.linear.causal import arguments as causal
from visattn.kernels.triton.linear.causal.gather import gather_chunks, run_states
from visattn.kernels.triton.linear.causal.grad import chunk_gradients
from visattn.kernels.triton.linear.causal.read import read_chunks
from visattn.kernels.triton.routing.router import CHANNELS, ROWS, Router
from visattn.kernels.triton.start import Starts
from visattn.layout import Layout
from visattn.patterns.routing import Routing

# A kernel, its arguments, and its launch in the terms of the table.
Case = tuple[Any, dict[str, Any], Config]

TOKENS, HEADS, AGENTS = 4096, 24, 49
ROUTING_TILE = ROWS, CHANNELS
# The kernels of causal linear attention.
CHUNKS = ("chunk_gather", "chunk_sums", "chunk_states", "chunk_read", "chunk_values", "chunk_queries", "chunk_keys")


def cases(dtype: torch.dtype, head_dim: int, mask: bool) -> dict[str, Callable[[], Case]]:
    """Each kernel by its name, made on demand; with or without a key mask."""
    return (
        {
            "gather": partial(_gather, dtype, head_dim, mask, False),
            "gather_grad": partial(_gather, dtype, head_dim, False, True),
            "read": partial(_read, dtype, head_dim, False),
            "value_grad": partial(_read, dtype, head_dim, mask, True),
            "feature_grad": partial(_feature_grad, dtype, head_dim, mask),
            "agents_in": partial(_agent, dtype, head_dim, mask, True),
            "agents_out": partial(_agent, dtype, head_dim, False, False),
        }
        | {name: partial(_chunks, name, dtype, head_dim, mask) for name in CHUNKS}
        | {name: partial(_routing, name, dtype, head_dim) for name in ("means", "products", "choice", "turned")}
    )


def _tokens(dtype: torch.dtype, head_dim: int, number: int = TOKENS) -> torch.Tensor:
    return torch.empty(1, number, HEADS, head_dim, dtype=dtype, device="meta")


def _key_mask(mask: bool) -> torch.Tensor | None:
    return torch.empty(1, TOKENS, dtype=torch.uint8, device="meta") if mask else None


def _setting() -> linear.Setting:
    return linear.Setting("elu", False)


def _weights() -> linear.Weights:
    return linear.Weights(*(torch.empty(1, HEADS, TOKENS, device="meta") for _ in range(3)))


def _state(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, HEADS, head_dim)
    return torch.empty((*shape, head_dim), device="meta"), torch.empty(shape, device="meta")


def _linear_case(kernel: Any, given: dict[str, Any], launch: linear.Launch) -> Case:
    return kernel, given, Config(launch.rows, max(launch.features, launch.channels), launch.warps, launch.stages)


def _gather(dtype: torch.dtype, head_dim: int, mask: bool, weighted: bool) -> Case:
    launch = linear.launches(dtype, head_dim, head_dim)["gather_grad" if weighted else "gather"]
    x, weights = _tokens(dtype, head_dim), _weights() if weighted else None
    given = linear.gather_arguments(x, x, _key_mask(mask), weights, _setting(), launch)
    return _linear_case(linear.gather, given, launch)


def _read(dtype: torch.dtype, head_dim: int, mask: bool, values: bool = False) -> Case:
    launch, x = linear.launches(dtype, head_dim, head_dim)["read"], _tokens(dtype, head_dim)
    given = linear.read_arguments(x, *_state(head_dim), _key_mask(mask), dtype, not values, _setting(), launch)
    return _linear_case(linear.read, given, launch)


def _feature_grad(dtype: torch.dtype, head_dim: int, mask: bool) -> Case:
    launch, x = linear.launches(dtype, head_dim, head_dim)["feature_grad"], _tokens(dtype, head_dim)
    # With a mask the keys' gradient, else the queries'.
    weights = None if mask else _weights()
    given = linear.grad_arguments(x, x, *_state(head_dim), _key_mask(mask), weights, _setting(), launch)
    return _linear_case(linear.feature_gradients, given, launch)


def _chunks(name: str, dtype: torch.dtype, head_dim: int, mask: bool) -> Case:
    """A kernel of causal linear attention, with decay, products inside chunks and dense tokens beside the grid."""
    x, weights, setting = _tokens(dtype, head_dim), _weights(), _setting()
    key_mask, rates = _key_mask(mask), torch.empty(HEADS, device="meta")
    steps = causal.Steps.of((TOKENS,), 0, head_dim, True)
    dense = torch.empty(1, HEADS, head_dim * head_dim + head_dim, device="meta")
    states = torch.empty(1, HEADS, steps.chunks, dense.shape[2], device="meta")
    table = causal.causal_launches(dtype, head_dim, head_dim)
    if name in ("chunk_gather", "chunk_sums"):
        weighted = name == "chunk_sums"
        launch = table["gather_chunks_grad" if weighted else "gather_chunks"]
        given = (None, weights) if weighted else (key_mask, None)
        kernel = gather_chunks, causal.chunk_arguments(x, x, *given, HEADS, rates, steps, setting, launch)
    elif name == "chunk_states":
        launch = linear.Launch(causal.BLOCK, 1, 1, 4, 1)
        kernel = run_states, causal.state_arguments(states, None, rates, steps, False)
    elif name in ("chunk_read", "chunk_values"):
        launch, given = table["read_chunks"], (None, weights) if name == "chunk_values" else (dense, None)
        shared = (states, given[0], key_mask, given[1], rates, steps, setting, launch, dtype)
        kernel = read_chunks, causal.read_arguments(x, x, x, *shared)
    else:
        launch, reverse = table["chunk_grad"], name == "chunk_keys"
        shared = (states, None if reverse else dense, key_mask, weights, rates, reverse, steps, setting, launch)
        kernel = chunk_gradients, causal.grad_arguments(x, x, x, x, *shared)
    return _linear_case(*kernel, launch)


def _agent(dtype: torch.dtype, head_dim: int, mask: bool, split: bool) -> Case:
    launch, x, few = agent.launch_of(dtype, head_dim), _tokens(dtype, head_dim), _tokens(dtype, head_dim, AGENTS)
    q, k = (few, x) if split else (x, few)
    given = agent.run_arguments(q, k, k, _key_mask(mask), 0.125, False, split, launch)
    return agent.attend_run, given, Config(*launch)


def _routing(name: str, dtype: torch.dtype, head_dim: int) -> Case:
    """A kernel of routing; its tables are real ones."""
    pattern, layout, launch = Routing((8, 8), 4), Layout((64, 64), 16), config(90, dtype, head_dim, "forward")
    q = torch.empty(1, layout.length, HEADS, head_dim, dtype=dtype)
    starts = Starts(q.device)
    work = Work(pattern, layout, 1.0, False, dict.fromkeys(DIRECTIONS, launch), starts)
    made = Router(q, q, work, starts).first_launches(q, q)[name]
    return made.kernel, made.given, Config(*ROUTING_TILE, made.warps, 1)


NAMES = tuple(cases(torch.float32, 16, False))
