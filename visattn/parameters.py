"""Learnable parameters of patterns: made per attention module, owned by a handle, saved apart from the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from visattn.files import as_path, check_writable_file, read_tensors, written_whole
from visattn.keep import outside_of_modes
from visattn.patterns import Pattern, parse
from visattn.version import __version__

# Where a weights file says which pattern each site had.
PATTERNS = "visattn_patterns"


class Learnable(NamedTuple):
    """The parameters of one attention module.

    Attributes:
        model: Name of its model.
        site: Its path in the model.
        pattern: Its pattern.
        values: Parameters by name.
    """

    model: str
    site: str
    pattern: Pattern
    values: nn.ParameterDict


def head_shape(module: Any) -> tuple[int, int]:
    """Query heads and channels per head of an attention module of a known library, or of a block around one.

    Raises:
        ValueError: If it does not tell.
    """
    module = next((getattr(module, n) for n in ("attn", "attn_block", "attention") if hasattr(module, n)), module)
    names = ("heads", "num_heads", "n_heads", "num_attention_heads")
    heads = next((getattr(module, n) for n in names if hasattr(module, n)), None)
    inner = None
    for name, parts in (("to_q", 1), ("to_query", 1), ("q_proj", 1), ("query", 1), ("to_qkv", 3), ("qkv", 3)):
        projection = getattr(module, name, None)
        if projection is not None and hasattr(projection, "out_features"):
            # Layers whose key heads are shared say how many channels come out of them.
            inner = getattr(projection, "expanded_features", projection.out_features) // parts
            break
    else:
        size = getattr(module, "head_dim", None)
        told = heads * size if isinstance(heads, int) and isinstance(size, int) else None
        inner = getattr(module, "inner_dim", told)
    if not isinstance(heads, int) or not isinstance(inner, int) or inner % heads:
        raise ValueError(
            f"{type(module).__name__} does not tell its heads and their size, so the pattern's learnable parameters "
            "have no shape: leave its layers out with layers="
        )
    return heads, inner // heads


def make_parameters(module: nn.Module, attention: Any, pattern: Pattern, dims: int) -> nn.ParameterDict:
    """Parameters of a learnable pattern at their initial values: float32, on the device of the module.

    Args:
        module: Tells the device.
        attention: Tells heads and head dim, see `head_shape`.
        pattern: The pattern.
        dims: Axes of the token grid.
    """
    heads, head_dim = head_shape(attention)
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))

    def make() -> nn.ParameterDict:
        found = pattern.initial_parameters(heads, head_dim, (-1,) * dims)
        return nn.ParameterDict({name: nn.Parameter(value.to(device)) for name, value in found.items()})

    # They are trained and read in other modes than this one.
    return outside_of_modes(make)


def following(values: Mapping[str, torch.Tensor] | nn.ParameterDict, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters by name, moved in place to where the model runs now; an optimizer keeps its references.

    Where that is no device, in a call for its shapes, they stay and keep their values.
    """
    if device.type == "meta":
        return {name: value.to(device) for name, value in values.items()}
    for value in values.values():
        if value.device != device:
            value.data = value.data.to(device)
            if value.grad is not None:
                value.grad.data = value.grad.data.to(device)
    return dict(values.items())


class PatternParameters(nn.Module):
    """Every learnable parameter of a handle: `parameters[site][name]`, sites in the order of the layers.

    A site is the path of an attention module, behind the name of its model and a dot if there are several models.
    Parameters stay float32 whatever the model's dtype: they are cast where they are used. The first call on another
    device moves them there.
    """

    def __init__(self, found: Sequence[Learnable]) -> None:
        super().__init__()
        several = len({each.model for each in found}) > 1
        self.patterns: dict[str, Pattern] = {}
        for each in found:
            site = f"{each.model}.{each.site}" if several else each.site
            self.patterns[site] = each.pattern
            self.add_module(_key(site), each.values)

    def __getitem__(self, site: str) -> nn.ParameterDict:
        """The parameters of a site by name."""
        if site not in self.patterns:
            raise KeyError(f"no site {site!r} has parameters; sites: {_listed(self.patterns)}")
        return self.get_submodule(_key(site))  # type: ignore[return-value]

    def __contains__(self, site: object) -> bool:
        return site in self.patterns

    def __iter__(self) -> Iterator[str]:
        """The sites."""
        return iter(self.patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    def save(self, path: str | Path) -> None:
        """Write all parameters to a safetensors file, which replaces an older one only when it is whole.

        Raises:
            ValueError: If there are none, or the file cannot be written.
        """
        from safetensors.torch import save_file

        if not self.patterns:
            raise ValueError("nothing to save: no pattern of this handle has learnable parameters")
        path = check_writable_file(as_path(path), (".safetensors",), force=True)
        tensors = {f"{site}.{name}": p.detach().cpu().contiguous() for site in self for name, p in self[site].items()}
        texts = {site: str(pattern) for site, pattern in self.patterns.items()}
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"visattn": __version__, PATTERNS: json.dumps(texts)})

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; all of it or, on an error, nothing.

        Raises:
            ValueError: If the file is missing or not such a file, or its sites, patterns or shapes are not these.
        """
        path = as_path(path)
        tensors, texts = read_weights(path)
        self._check_sites(path, tensors, texts)
        with torch.no_grad():
            for site in self:
                for name, parameter in self[site].items():
                    parameter.copy_(tensors[f"{site}.{name}"])

    def _check_sites(self, path: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
        missing, unexpected = [s for s in self if s not in texts], [s for s in texts if s not in self]
        if missing or unexpected:
            parts = [f"it lacks {_listed(missing)}"] * bool(missing)
            parts += [f"it has {_listed(unexpected)}, which no learnable pattern uses here"] * bool(unexpected)
            raise ValueError(f"weights {path} are for other sites: {'; '.join(parts)}; apply as when they were saved")
        for site, pattern in self.patterns.items():
            if parse(texts[site]) != pattern:
                raise ValueError(
                    f"weights {path} are for {texts[site]} at {site}, not for {pattern}; apply as when they were saved"
                )
            shapes = {n: list(p.shape) for n, p in self[site].items()}
            found = {n: list(tensors[f"{site}.{n}"].shape) if f"{site}.{n}" in tensors else None for n in shapes}
            if found != shapes:
                raise ValueError(
                    f"weights {path} have {found} at {site}, where {pattern} takes {shapes}: pass those of this model"
                )


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, and the text of each site's pattern.

    Raises:
        ValueError: If the file is missing or not one that a handle saved.
    """
    tensors, metadata = read_tensors(path, "file of weights", "pass a file that handle.save(path) wrote")
    if PATTERNS not in metadata:
        raise ValueError(f"weights {path} do not say which patterns they are for: pass a file that handle.save wrote")
    return tensors, json.loads(metadata[PATTERNS])


def _key(site: str) -> str:
    # Names of submodules hold no dots.
    return site.replace(".", "/")


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + f" and {len(names) - 4} more" * (len(names) > 4) or "none"
