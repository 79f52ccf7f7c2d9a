"""Slabs under `apply(..., parallel=...)`: a model's tokens are cut where diffusers' own context parallelism cuts them.

diffusers splits sequences in equal runs of tokens, text included. Here each rank gets a slab of the grid along one axis
and all other tokens: text, and reference images behind the grid. The places are those of the model's `_cp_plan`; where
`enable_parallelism` has put hooks, these rest while the patch is there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from visattn.given import class_among
from visattn.layout import Layout
from visattn.parallel import Slabs, best_axis
from visattn.parallel.dense import gathered_slabs
from visattn.parallel.ulysses import JOINS_HEADS
from visattn.patterns import ComposedPattern, Linear, MergingPattern, Pattern, RoutedPattern, SharingPattern
from visattn.patterns.radial import Radial
from visattn.pipelines.patch.cuts import CutInputs, CutOutputs, Join, Stand
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
        self._cuts: list[CutInputs] = []
        self._resting: list[tuple[Any, Any, Any]] = []
        check_class(model)
        for pattern in run.schedule.patterns:
            check_pattern(pattern, how)

    def install(self, model: torch.nn.Module) -> None:
        """Cut and join where the model's plan says."""
        from diffusers.hooks.context_parallel import _get_submodule_by_name

        self._rest(model)
        for path, plan in model._cp_plan.items():  # type: ignore[union-attr,operator]
            found: Any = _get_submodule_by_name(model, path)
            for module in found if isinstance(found, list) else [found]:
                if isinstance(plan, dict):
                    self._install_cuts(module, plan, (class_among(model, CUT), path))
                else:
                    dims = [plan] if not isinstance(plan, list | tuple) else plan
                    self._handles.append(
                        module.register_forward_hook(Join(self.join, [d and d.gather_dim for d in dims]))
                    )
        self._handles.append(model.register_forward_pre_hook(Stand(self._cuts)))

    def _install_cuts(self, module: torch.nn.Module, plan: dict[Any, Any], where: tuple[str, str]) -> None:
        """Cut inputs and outputs of a module."""
        from diffusers.models._modeling_parallel import ContextParallelInput

        inputs = {k: c for k, c in plan.items() if isinstance(c, ContextParallelInput)}
        before = {k: c for k, c in inputs.items() if not c.split_output and not is_text(k)}
        after = {k: c for k, c in inputs.items() if c.split_output and (*where, k) not in TEXT_OUTPUTS}
        if before:
            cut = CutInputs(self.cut, before, module)
            self._cuts.append(cut)
            self._handles.append(module.register_forward_pre_hook(cut, with_kwargs=True))
        if after:
            self._handles.append(module.register_forward_hook(CutOutputs(self.cut, after)))

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cut in self._cuts:
            cut.leave()
        self._cuts.clear()
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

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of a tensor with all tokens on an axis."""
        return self.slabs(x.shape[dim]).shard(x, self.rank, dim)

    def join(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens, of a tensor with those of this process on an axis."""
        return gathered_slabs(x, self.slabs(x.shape[dim], local=True), self.group, dim)

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
    if class_among(model, CUT) and isinstance(getattr(model, "_cp_plan", None), dict):
        return
    if getattr(model, "_cp_plan", None) is None:
        why = "diffusers has no context parallelism for it (no _cp_plan), so nothing says where its tokens may be cut"
    else:
        why = "its plan cuts more than a grid and its positions (a second stream, or inputs of single layers)"
    raise ValueError(f"parallel= cannot cut {type(model).__name__}: {why}; classes: {', '.join(sorted(CUT))}")


def check_pattern(pattern: Pattern, how: str) -> None:
    """Raise a ValueError for patterns that no rank can run on its share."""
    if pattern.learnable or isinstance(pattern, MergingPattern):
        raise ValueError(f"{pattern} under parallel={how!r}: it has parameters or tokens of all heads and ranks")
    if pattern.joins_heads and not (how == "halo" and isinstance(pattern, Linear)):
        raise ValueError(f"{pattern} under parallel={how!r}: {JOINS_HEADS}")
    if how == "halo" and isinstance(pattern, SharingPattern):
        raise ValueError(
            f"{pattern} under parallel='halo': a step that refreshes reads keys of every rank, and neighbours exchange "
            "rows alone: use parallel='ulysses'"
        )
    composed = isinstance(pattern, ComposedPattern) and not isinstance(pattern, Linear)
    if how == "halo" and (composed or isinstance(pattern, RoutedPattern)):
        raise ValueError(
            f"{pattern} under parallel='halo': which keys it reads is known only from q and k of every rank: use "
            "parallel='ulysses'"
        )
