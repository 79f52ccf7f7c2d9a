"""The hooks that tell a run what its model is doing.

`torch.compile(model)` calls the hooks of the model outside of its graph. `model.compile()` and compiled code around
the model trace them: the one before the forward becomes an operator, the others do nothing. Copies and pickles of
a patched model have hooks that do nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._dynamo import eval_frame
from torch._dynamo.eval_frame import skip_code

from visattn.copies import Hook
from visattn.outside import Outside
from visattn.pipelines.patch import numbering, operators, telling
from visattn.pipelines.patch.clones import says_where
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.sites import Site
from visattn.pipelines.patch.untraced import untraced


def _own_frame(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the compiler from making a graph of its own of a hook that is called outside of graphs."""
    skip_code(hook.__code__)
    return hook


# The compiler that would trace what this thread calls, None if there is none; where torch does not tell, there may be.
_compiler_in_force: Callable[[], Any] = getattr(eval_frame, "get_eval_frame_callback", lambda: _own_frame)


class _Hook(Hook):
    """Refers to a run by number: what compiled code sees of it is one constant."""

    def __init__(self, run: DiffusersRun) -> None:
        self.number = run.number

    def run(self) -> DiffusersRun | None:
        return numbering.look_up(self.number)


class Begin(_Hook):
    """Before a forward of the model: where do its tokens sit?"""

    def __init__(self, run: DiffusersRun, names: tuple[str, ...], learns: Callable[[], None]) -> None:
        super().__init__(run)
        self.learns = learns
        # Hooks keep the run alive: a handle may be dropped without undoing anything.
        self.keep = run
        self.names, self.config, self.family = names, run.config, run.family

    @_own_frame
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook."""
        if not torch.compiler.is_compiling():
            return self._begin(args, kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        seen = self.family.seen(self.config, given)
        name = self.family.anchor
        first = given[name][0] if isinstance(given[name], list) else given[name]
        samples = [n for sample in seen.samples for n in (*sample.grid, sample.prefix)]
        latents: Any = operators.BEGIN_FORWARD(
            first,
            seen.ids,
            list(seen.grid),
            seen.prefix,
            seen.suffix,
            samples,
            seen.why,
            self.number,
            torch.is_grad_enabled(),
        )
        if isinstance(given[name], list):
            latents = [latents, *given[name][1:]]
        if name in kwargs:
            return args, {**kwargs, name: latents}
        at = self.names.index(name)
        return (*args[:at], latents, *args[at + 1 :]), kwargs

    @untraced
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.learns()
        self.keep.begin(self.family.seen(self.config, dict(zip(self.names, args, strict=False)) | kwargs))


class Finish(_Hook):
    """After a forward of the model, also one that raised: what is called next is outside of it."""

    @_own_frame
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook; there is no output where the forward raised."""
        if not torch.compiler.is_compiling():
            self._finish(output is None)

    @untraced
    def _finish(self, raised: bool) -> None:
        run = self.run()
        if run is None:
            return
        if raised:
            run.leave()
        else:
            run.finish()


class Enter(_Hook):
    """Before a forward of an attention module, or of a block around it: which one is it, and of which forward?"""

    def __init__(self, run: DiffusersRun, paths: dict[int, str]) -> None:
        super().__init__(run)
        # Traced code reads nothing of it.
        self.keep = run
        self.paths = paths

    @_own_frame
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook; it runs before every block, so each function that it calls counts."""
        if torch.compiler.is_dynamo_compiling():
            telling.enter(module)
            return
        if _compiler_in_force() is None:
            self._enter(module, args, kwargs)
        else:
            self._enter_untraced(module, args, kwargs)

    @untraced
    def _enter_untraced(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(module, args, kwargs)

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.keep
        here = run.here
        if here.forward is None or here.forward.learns or torch._C._current_graph_task_id() >= 0:
            first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            if first is not None:
                run.forwards.pass_by(first)
        path = self.paths.get(id(module))
        if path is not None:
            here.site = path


def _around(paths: Sequence[str]) -> list[str]:
    """Paths of the modules between a model and its attention modules, any of which may be recomputed alone."""
    inner = (".".join(parts[:n]) for parts in (path.split(".") for path in paths) for n in range(1, len(parts)))
    return list(dict.fromkeys(inner))


class Hooks:
    """All hooks of a patched model."""

    def __init__(self, model: torch.nn.Module, run: DiffusersRun, sites: Sequence[Site]) -> None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._sites = sites
        self._enter = Enter(run, {id(site.module): site.name.path for site in sites})
        # Gradients alone ask which forward a block belongs to: the hooks before blocks come with the first ones.
        paths = [site.name.path for site in sites]
        around = _around(paths)
        self._blocks = [model.get_submodule(path) for path in [*around, *paths]]
        self._outside = Outside(model, [*around, *paths], run.forwards.pass_by)
        self._handles = [
            model.register_forward_pre_hook(Begin(run, names, self._learn), with_kwargs=True, prepend=True),
            model.register_forward_hook(Finish(run), always_call=True),
        ]
        self._hooked: set[int] = set()
        self.follow()

    def follow(self) -> None:
        """Hook the modules whose processors do not say themselves where they are."""
        self._hook([site.module for site in self._sites if not says_where(site.installed)])

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._blocks.clear()
        self._outside.leave()

    def _learn(self) -> None:
        """A forward with gradients begins."""
        self._outside.stand()
        self._hook(self._blocks)
        self._blocks.clear()

    def _hook(self, modules: Sequence[torch.nn.Module]) -> None:
        for module in modules:
            if id(module) not in self._hooked:
                self._hooked.add(id(module))
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
