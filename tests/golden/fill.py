"""Deterministic weights and inputs of the golden cases.

A golden file holds no weights: every parameter, and every BatchNorm running statistic, of the
original implementation was set to `fill_value(name, shape)`, where `name` is its official
state_dict key. Fill a re-implementation that keeps those keys the same way, feed it
`make_input(shape, seed)`, and its output must equal the stored one.

A file is a dict, read with `torch.load(path, weights_only=True)`:
    config        constructor arguments of the original (official names)
    keys          state_dict key -> shape (buffers other than running statistics were left alone)
    input_shapes, input_seed
    output        the whole output where it has at most 100,000 values, else every
                  (numel // 50,000)-th value of the flattened output, the first 50,000 of them
    output_shape
    taps          label -> {stride, values, mean, std}: flattened[::stride][:4096] of an inner output
    float64_max_abs_diff   the original's own float32 error against float64
`radial_blocks.pt` is a list of {frames, tokens_per_frame, text, decay, sink, block, mask}: the
block mask of the original Radial Attention for that video (text tokens last).
`quantizable.pt` (outlier-free-transformers, one BERT attention module without its output
projection, the query's weights times 3), `key_driven.pt` (key-driven-gqa, modules loaded from
one ViT attention; `rules`: counts of query heads for norms), `lightning.pt`
(lightning-attention's torch form, product and sum of weights apart; queries and keys are
absolute values), `layers.pt` (ULSAM and Gaussian-Adaptive-Attention) and `lrgt_micro.pt`
(Long-Range-Grouping-Transformer's encoder on three views) were made in float64 but for the
last, with weights filled by the originals' own names. `fit_micro.pt` and
`fit_denoiser_micro.pt` (pix2seq's FIT and its denoiser, of TensorFlow, in float64: tokens after
the last norm, row by row; pictures and latents, with sines and cosines in float64 too) have weights
filled by the names of ours, which `keys` are.
"""

import hashlib

import numpy as np
import torch


def fill_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of the parameter or running statistic called `name`, float32."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    noise = np.random.RandomState(seed).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        value = 0.75 + 0.25 * np.abs(noise)
    elif name.endswith("running_mean"):
        value = 0.1 * noise
    elif name.endswith(("bias", "rpb", "_table")):
        value = 0.2 * noise
    elif len(shape) <= 1 or "gamma" in name:
        value = 1.0 + 0.1 * noise
    else:
        value = noise / np.sqrt(max(1, np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value)).to(torch.float32).reshape(tuple(shape))


@torch.no_grad()
def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Set every parameter and running statistic of `model` in place; returns it in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.copy_(fill_value(name, parameter.shape))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(fill_value(name, buffer.shape))
    return model.eval()


def make_input(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Standard-normal input, float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape))).float()
