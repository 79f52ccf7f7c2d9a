"""Slabs under `apply(..., parallel=...)`: a model's tokens are cut where diffusers' own context parallelism cuts them.

diffusers splits sequences in equal runs of tokens, text included. Here each rank gets a slab of the grid along one axis
and all other tokens: text, and reference images behind the grid. The places are those of the model's `_cp_plan`; where
`enable_parallelism` has put hooks, these rest while the patch is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from visattn.layout import Layout
from visattn.parallel import Slabs, best_axis
from visattn.parallel.dense import gathered_slabs
from visattn.patterns import ComposedPattern, MergingPattern, Pattern, RoutedPattern
from visattn.patterns.radial import Radial
from visattn.runtime.run import Run

# Model classes whose plans cut nothing but the grid, its positions, and text.
CUT = {
    "ChronoEditTransformer3DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
}
# Outputs that are of the text, by class, module and place.
TEXT_OUTPUTS = {("QwenImageTransformer2DModel", "pos_embed", 1)}


class Sharding:
    """How one model's tokens are cut while it is patched.

    Args:
        model: The model.
        run: Its run, which knows where the tokens of a forward sit.
        how: "ulysses" or "halo".
        mesh: A one-dimensional mesh or a process group; None for the model's own mesh, or all ranks.

    Raises:
        ValueError: If the model or a pattern cannot be cut.
    """

    def __init__(self, model: torch.nn.Module, run: Run, how: str, mesh: Any) -> None:
        self.how, self.group = how, group_of(model, mesh)
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self._run = run
        self._handles: list[Any] = []
        self._resting: list[tuple[Any, Any, Any]] = []
        check_class(model)
        for pattern in run.schedule.patterns:
            check_pattern(pattern, how)

    def install(self, model: torch.nn.Module) -> None:
        """Cut and join where the model's plan says."""
        from diffusers.hooks.context_parallel import _get_submodule_by_name
        from diffusers.models._modeling_parallel import ContextParallelInput

        self._rest(model)
        for path, plan in model._cp_plan.items():  # type: ignore[union-attr,operator]
            found: Any = _get_submodule_by_name(model, path)
            for module in found if isinstance(found, list) else [found]:
                if not isinstance(plan, dict):
                    dims = [plan] if not isinstance(plan, list | tuple) else plan
                    self._handles.append(module.register_forward_hook(_Join(self, [d and d.gather_dim for d in dims])))
                    continue
                inputs = {k: c for k, c in plan.items() if isinstance(c, ContextParallelInput)}
                before = {k: c for k, c in inputs.items() if not c.split_output and not is_text(k)}
                after = {
                    k: c
                    for k, c in inputs.items()
                    if c.split_output and (type(model).__name__, path, k) not in TEXT_OUTPUTS
                }
                if before:
                    cut = _CutInputs(self, before, type(module))
                    self._handles.append(module.register_forward_pre_hook(cut, with_kwargs=True))
                if after:
                    self._handles.append(module.register_forward_hook(_CutOutputs(self, after)))

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for reference, before, after in self._resting:
            reference.pre_forward, reference.post_forward = before, after
        self._resting.clear()

    def slabs(self, length: int, local: bool = False) -> Slabs:
        """How a sequence of the forward that runs is cut: the grid in slabs, what is behind it whole.

        Args:
            length: Tokens of the sequence.
            local: Whether it is a rank's, already cut.
        """
        where: Any = None if self._run.forward is None else self._run.forward.where
        grid = () if where is None else where.grid
        if where is None or not grid or where.samples or where.why:
            raise ValueError(
                f"parallel={self.how!r} cuts one grid for all samples, and this forward of {self._run.name} has "
                f"none, or several{'' if where is None or not where.why else f' ({where.why})'}: leave parallel out"
            )
        radial = any(isinstance(pattern, Radial) for pattern in self._run.schedule.patterns)
        axis = 0 if radial else best_axis(Layout(grid), self.ranks)
        made = Slabs.even(Layout(grid), self.ranks, axis)
        rest = length - (made.local(self.rank).tokens if local else made.layout.tokens)
        if rest < 0:
            raise ValueError(
                f"parallel={self.how!r}: a sequence of {length} tokens is shorter than the "
                f"{'slab of the ' * local}grid {Layout(grid)} of {self._run.name}"
            )
        return Slabs(Layout(grid, 0, rest), axis, made.sizes)

    def _rest(self, model: torch.nn.Module) -> None:
        """Let the hooks of diffusers' own context parallelism do nothing."""
        for module in model.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            if registry is None:
                continue
            for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):
                if name.startswith(("cp_input---", "cp_output---")):
                    self._resting.append((reference, reference.pre_forward, reference.post_forward))
                    reference.pre_forward, reference.post_forward = _same_arguments, _same_output


def _same_arguments(module: Any, *args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def _same_output(module: Any, output: Any) -> Any:
    return output


def is_text(name: Any) -> bool:
    """Whether an input is of the text, which every rank has whole."""
    return isinstance(name, str) and name.startswith(("encoder_", "txt_"))


def group_of(model: torch.nn.Module, mesh: Any) -> dist.ProcessGroup | None:
    """The process group of a mesh, of a model's own, or of all ranks.

    Raises:
        ValueError: If there are no processes, or the mesh has several axes.
    """
    if not dist.is_initialized():
        raise ValueError(
            "parallel= shares a model's tokens over processes, and there is no process group: start with torchrun and "
            "call torch.distributed.init_process_group first"
        )
    config: Any = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if mesh is None and config is not None:
        mesh = config._flattened_mesh
    if mesh is None or isinstance(mesh, dist.ProcessGroup):
        return mesh
    if getattr(mesh, "ndim", None) != 1:
        raise ValueError(f"mesh={mesh!r} must be a DeviceMesh of one axis or a process group: pass mesh['name']")
    return mesh.get_group()


def check_class(model: torch.nn.Module) -> None:
    """Raise a ValueError if diffusers does not say where a model's tokens may be cut, or cuts more than those."""
    name = type(model).__name__
    if name in CUT and isinstance(getattr(model, "_cp_plan", None), dict):
        return
    if getattr(model, "_cp_plan", None) is None:
        why = "diffusers has no context parallelism for it (no _cp_plan), so nothing says where its tokens may be cut"
    else:
        why = "its plan cuts more than a grid and its positions (a second stream, or inputs of single layers)"
    raise ValueError(f"parallel= cannot cut {name}: {why}; classes: {', '.join(sorted(CUT))}")


def check_pattern(pattern: Pattern, how: str) -> None:
    """Raise a ValueError for patterns that no rank can run on its share."""
    if pattern.learnable or isinstance(pattern, MergingPattern):
        raise ValueError(f"{pattern} under parallel={how!r}: it has parameters or tokens of all heads and ranks")
    if how == "halo" and isinstance(pattern, RoutedPattern | ComposedPattern):
        raise ValueError(
            f"{pattern} under parallel='halo': which keys it reads is known only from q and k of every rank: use "
            "parallel='ulysses'"
        )


class _CutInputs:
    """Cuts inputs of a module before its forward."""

    def __init__(self, sharding: Sharding, plan: dict[Any, Any], kind: type) -> None:
        import inspect

        self._sharding, self._plan = sharding, plan
        self._names = list(inspect.signature(kind.forward).parameters)[1:]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, kwargs = list(args), dict(kwargs)
        for name, cut in self._plan.items():
            if name in kwargs:
                kwargs[name] = _cut(self._sharding, kwargs[name], cut)
            elif name in self._names and (at := self._names.index(name)) < len(given):
                given[at] = _cut(self._sharding, given[at], cut)
        return tuple(given), kwargs

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _nothing, ()


class _CutOutputs:
    """Cuts outputs of a module after its forward."""

    def __init__(self, sharding: Sharding, plan: dict[Any, Any]) -> None:
        self._sharding, self._plan = sharding, plan

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        one = isinstance(output, torch.Tensor)
        parts = [output] if one else list(output)
        for at, cut in self._plan.items():
            parts[at] = _cut(self._sharding, parts[at], cut)
        return parts[0] if one else tuple(parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _nothing, ()


class _Join:
    """Joins outputs of a module after its forward."""

    def __init__(self, sharding: Sharding, dims: list[int | None]) -> None:
        self._sharding, self._dims = sharding, dims

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        one = isinstance(output, torch.Tensor)
        parts = [output] if one else list(output)
        for at, dim in enumerate(self._dims):
            if dim is not None:
                slabs = self._sharding.slabs(parts[at].shape[dim], local=True)
                parts[at] = gathered_slabs(parts[at], slabs, self._sharding.group, dim)
        return parts[0] if one else tuple(parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    from visattn.pipelines.patch.hooks import unpatched

    return unpatched


def _cut(sharding: Sharding, x: Any, cut: Any) -> Any:
    """A rank's part of a tensor; what has other dimensions than the plan expects stays, as in diffusers."""
    if not isinstance(x, torch.Tensor) or (cut.expected_dims is not None and x.ndim != cut.expected_dims):
        return x
    return sharding.slabs(x.shape[cut.split_dim]).shard(x, sharding.rank, cut.split_dim)
