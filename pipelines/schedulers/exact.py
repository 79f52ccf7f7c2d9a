"""What exact schedulers share: settings, states in float64, and the order in which states are evaluated."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from visattn.given import as_numbers, said
from visattn.pipelines.schedulers.settings import check_known, init_names, plain_kind, taken
from visattn.pipelines.schedulers.steps import Steps
from visattn.pipelines.schedulers.wide import State, Wide

Pair = tuple[Wide, Wide]
# Of the rounding of states that a round trip may give back enlarged.
TOLERANCE = 1e-4


class ExactScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler with two states of twice float64's precision, whose steps have an exact inverse.

    The model's input and `prev_sample` have the dtype of the sample that came in; what is kept are the states. The
    model must give equal outputs for equal inputs, so the way back needs the same batches and the same patterns.

    Args:
        **settings: Of a `DDIMScheduler`, or of a `FlowMatchEulerDiscreteScheduler` if there is a `shift`.

    Raises:
        ValueError: If a setting is unknown or has no inverse.

    Attributes:
        timesteps: When the model is evaluated, in order.
        order: Evaluations for each step.
    """

    order = 1
    init_noise_sigma = 1.0
    # Whether the way is back from the clean sample to noise.
    inverse = False
    # Evaluations that are behind two states.
    _behind = 0

    def __init__(self, **settings: Any) -> None:
        check_known(settings, init_names(type(self)), plain_kind(settings), type(self).__name__)
        self._steps = Steps(settings)
        self.register_to_config(**dict(self._steps.plain.config), **self._own())
        self.num_inference_steps: int | None = None
        self.timesteps = self._steps.plain.timesteps
        self._pending: tuple[Pair, int] | None = None
        self._reset()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """A scheduler with the settings of another one, DDIM, flow matching by Euler steps or exact.

        Solvers that run flow matching (`prediction_type="flow_prediction"`) give their `flow_shift`. What only the
        other scheduler has is left out, as diffusers does.

        Args:
            config: The other one's `config`; names in it that no scheduler has are warned of.
            return_unused_kwargs: Whether to return options that it does not know as well, rather than to refuse them.
            **options: Settings instead of those.

        Raises:
            ValueError: If an option is unknown, or a setting has no inverse.
        """
        own = init_names(cls)
        found = {**taken(config or {}, own, cls.__name__), **options}
        plain = plain_kind(found)
        if not return_unused_kwargs:
            check_known(options, own, plain, cls.__name__)
        settings = {name: value for name, value in found.items() if name in own | init_names(plain)}
        made = cls(**settings)
        return (made, {k: v for k, v in options.items() if k not in settings}) if return_unused_kwargs else made

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels of flow matching."""
        return self._steps.plain.sigmas

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next evaluation, None before the first."""
        return self._at

    @property
    def begin_index(self) -> int | None:
        """Position in `timesteps` at which a run begins, None to find out."""
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin a run at a position in `timesteps`."""
        self._begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run with so many steps; forgets the states, but for those of `set_state` that no step has taken yet.

        Args:
            num_inference_steps: Steps.
            device: Where the timesteps are.
            sigmas: Noise levels of flow matching instead of a number.
            mu: Shift of flow matching with dynamic shifting.

        Raises:
            ValueError: If the number is not the one that `set_state` was told.
        """
        options = {name: value for name, value in {"sigmas": sigmas, "mu": mu}.items() if value is not None}
        found = self._steps.set_timesteps(num_inference_steps, device=device, **options)
        self.num_inference_steps = len(found)
        growth = self._growth(len(found)) * torch.finfo(torch.float64).eps
        if growth > TOLERANCE:
            warnings.warn(
                f"{type(self).__name__} with {len(found)} steps enlarges what float64 rounds to {growth:.0e}: its "
                "inverse is exact only from what state() gives, by a model that repeats every bit. Take fewer steps, "
                f"or {self._remedy}",
                stacklevel=2,
            )
        self._reset()
        self.timesteps = self._evaluated(found)
        if self._pending is not None:
            pair, steps = self._pending
            if steps != len(found):
                raise ValueError(f"set_state was told {steps} steps, and this run has {len(found)}: give both the same")
            self._pair, following = self._resumed(pair, steps)
            self._given = following.hi
            self.timesteps = self.timesteps[self._behind :]

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A clean sample with noise of a timestep (DDIM)."""
        return self._steps.plain.add_noise(original_samples, noise, timesteps)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A clean sample with noise of a timestep (flow matching)."""
        level = self._steps.plain.sigmas[(self._begin or 0) // self.order].to(sample)
        return level * noise + (1 - level) * sample

    def state(self) -> State:
        """The two states in float64, for the way back: `set_state` of the inverse takes them.

        Pass on what this gives, not its two tensors: it has what float64 leaves out beside them.

        Raises:
            ValueError: If no step ran.
        """
        return State.of(self._ends())

    def _ends(self) -> Pair:
        if len(self._pair) < 2:
            raise ValueError(f"{type(self).__name__} has no states yet: run its steps first")
        return self._pair[0], self._pair[1]

    def set_state(self, state: Sequence[torch.Tensor], num_inference_steps: int) -> torch.Tensor:
        """Begin the next run, whose `set_timesteps` follows, from the two states at which a way ended.

        Args:
            state: What `state()` gave there; two tensors do as well, and are as exact as float64.
            num_inference_steps: Steps of that way, and of the next run.

        Returns:
            What the loop, or a pipeline as `latents`, begins with, in float64.

        Raises:
            ValueError: If the states do not fit each other.
        """
        listed = isinstance(state, Sequence | torch.Tensor)
        if not listed or not all(isinstance(each, torch.Tensor) for each in state):
            raise ValueError(f"a state is two tensors of one shape, as state() gives them, not {said(state)}")
        if len(state) != 2 or state[0].shape != state[1].shape:
            raise ValueError(f"a state is two tensors of one shape, not {[tuple(t.shape) for t in state]}")
        self._pending = State.wide(state), num_inference_steps
        return self._resumed(*self._pending)[1].hi

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One evaluation further.

        Args:
            model_output: What the model says of the sample.
            timestep: Its timestep.
            sample: What was evaluated: what the last call returned, unchanged.
            return_dict: Whether to return an object with `prev_sample` rather than a tuple.

        Raises:
            ValueError: If the sample was changed since: such a run has no inverse.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step")
        if self._at is None:
            if self._pending is not None and not self._pair:
                raise ValueError("call set_timesteps after set_state: a run begins with it")
            self._at, self._pending = self._start(timestep), None
        if self._given is not None and sample is not self._given and not torch.equal(sample, self._given.to(sample)):
            raise ValueError(
                "the sample is not what the last step returned: a run whose latents are changed on the way "
                "(inpainting, callbacks) has no exact inverse; use DDIM or Euler steps for it"
            )
        if not self._pair:
            self._begin_from(Wide(sample.double()))
        found = self._advance(model_output, self._at)
        self._at += 1
        self._given = found.hi.to(sample.dtype)
        return SchedulerOutput(prev_sample=self._given) if return_dict else (self._given,)

    def __len__(self) -> int:
        return len(self._steps)

    def _reset(self) -> None:
        self._pair: list[Wide] = []
        self._given: torch.Tensor | None = None
        self._at: int | None = None
        self._begin: int | None = None

    def _start(self, timestep: Any) -> int:
        """Where in `timesteps` a run begins."""
        if self._begin is not None or self._given is not None:
            return self._begin or 0
        found = (self.timesteps == as_numbers(timestep).to(self.timesteps).flatten()[0]).nonzero()
        if not len(found):
            raise ValueError(f"timestep {timestep} is none of the {len(self.timesteps)} of this run")
        return int(found[0])

    @abstractmethod
    def _own(self) -> dict[str, Any]:
        """Settings beside those of the plain steps."""

    @property
    @abstractmethod
    def _remedy(self) -> str:
        """What makes errors grow less."""

    @abstractmethod
    def _growth(self, steps: int) -> float:
        """How much the way back enlarges an error."""

    @abstractmethod
    def _evaluated(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timestep of each evaluation, from those of the steps."""

    @abstractmethod
    def _begin_from(self, sample: Wide) -> None:
        """Begin with one state."""

    @abstractmethod
    def _resumed(self, state: Pair, steps: int) -> tuple[list[Wide], Wide]:
        """The states with which a run of so many steps goes on from these, and what it evaluates first."""

    @abstractmethod
    def _advance(self, output: torch.Tensor, at: int) -> Wide:
        """Use the evaluation at a position; returns what is to be evaluated next, at the end the sample."""
