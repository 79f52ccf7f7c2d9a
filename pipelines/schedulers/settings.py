"""Which settings an exact scheduler takes from the configuration of another scheduler, and which it does not know."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

FLOW = "flow_prediction"


def plain_kind(settings: Mapping[str, Any]) -> type:
    """The scheduler whose steps settings describe: flow matching if they have a `shift`, else DDIM."""
    return FlowMatchEulerDiscreteScheduler if "shift" in settings else DDIMScheduler


def init_names(kind: type) -> set[str]:
    """Names of the settings of a class."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(kind.__init__).parameters
    return {name for name, each in found.items() if each.kind not in kinds} - {"self"}


def check_known(given: Iterable[str], own: set[str], plain: type, kind: str) -> None:
    """Refuse options that a scheduler does not know.

    Args:
        given: Their names.
        own: Those of the scheduler itself.
        plain: The scheduler with the plain steps.
        kind: Name of the scheduler, for the message.

    Raises:
        ValueError: If one is unknown; it lists those that are known.
    """
    known = own | init_names(plain)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{kind} does not know {', '.join(unknown)}: its options are {', '.join(sorted(known))} "
            f"(those of {plain.__name__} and its own)"
        )


def taken(config: Mapping[str, Any], own: set[str], kind: str) -> dict[str, Any]:
    """The settings that a scheduler takes from the configuration of another one.

    What only the other one has, or a scheduler to which diffusers lets it change, is left out, as diffusers does. Names
    that none of them has are warned of.

    Args:
        config: The other one's `config`.
        own: Settings of the scheduler itself.
        kind: Name of the scheduler, for the message.
    """
    config = dict(config)
    if config.get("prediction_type") == FLOW and "shift" not in config:
        # Solvers that run flow matching, like UniPC of Wan, name its shift otherwise.
        config |= {"shift": config.get("flow_shift") or 1.0}
    known = own | init_names(plain_kind(config))
    foreign = _names_of_others(config.get("_class_name"))
    unknown = sorted(name for name in config if not name.startswith("_") and name not in known | foreign)
    if unknown:
        warnings.warn(
            f"{kind} does not know {', '.join(unknown)} of the configuration and ignores it: its settings are "
            f"{', '.join(sorted(known))}",
            stacklevel=3,
        )
    return {name: value for name, value in config.items() if name in known}


def _names_of_others(name: Any) -> set[str]:
    """Settings of the other exact schedulers, of those that diffusers changes between, and of the one named."""
    from visattn.pipelines import schedulers

    kinds = [getattr(schedulers, each) for each in schedulers.__all__]
    kinds += [getattr(diffusers, each.name, None) for each in KarrasDiffusionSchedulers]
    kinds.append(getattr(diffusers, str(name), None))
    return set[str]().union(*(init_names(each) for each in kinds if isinstance(each, type)))
