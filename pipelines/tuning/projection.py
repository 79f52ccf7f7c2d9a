"""What stands behind attention in a module: the weights of its output projection."""

from __future__ import annotations

import torch


def projection(model: torch.nn.Module, path: str, channels: int) -> torch.Tensor | None:
    """The matrix [out, channels] that a layer's attention output is multiplied by, None where it is not found.

    Most modules have it as `to_out`; single-stream blocks project attention and the hidden layer of their MLP together,
    attention first.

    Args:
        model: The model.
        path: Path of the attention module.
        channels: Of all heads together.
    """
    module = model.get_submodule(path)
    own = getattr(module, "to_out", None)
    found = own[0] if isinstance(own, torch.nn.ModuleList | torch.nn.Sequential) and len(own) else own
    if found is None:
        parent = path.rpartition(".")[0]
        found = getattr(model.get_submodule(parent), "proj_out", None)
    weight = getattr(found, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] < channels:
        return None
    return weight.detach()[:, :channels]
