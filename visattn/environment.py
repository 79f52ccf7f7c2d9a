"""What this machine has: versions, devices, threads, backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "peft",
    "timm",
    "natten",
    "xformers",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "matplotlib",
    "scikit-image",
)


def versions() -> dict[str, str | None]:
    """Version of Python, of visattn and of every package it may use; None where one is not installed."""
    from visattn.version import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "visattn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """The CPU, then every CUDA device: name, memory in bytes, and what decides which kernels it runs."""
    import torch

    from visattn.memory import machine_memory

    cpu = {
        "device": "cpu",
        "name": cpu_name(),
        "memory": machine_memory(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    found = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": capability,
            }
        )
    return found


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """The 8-bit precisions that a device computes in, rather than simulates."""
    import torch

    if device.type != "cuda":
        return ()
    capability = torch.cuda.get_device_capability(device)
    return ("int8", "fp8") if capability >= (8, 9) else ("int8",) if capability >= (8, 0) else ()


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def busy() -> str:
    """Why CPU times measured just now mean little, empty if they do not."""
    cores = os.cpu_count() or 1
    # Windows has no load average.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 2 * cores:
        return ""
    return f"the machine was busy (load {load:.1f} on {cores} cores), so times are those of a machine under load"


def check_device(device: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: If it does not exist on this machine.
    """
    import torch

    try:
        target = torch.device(device)
    except RuntimeError:
        # What torch says of it are the names of all devices that it was ever made for.
        why = "torch has none of this name"
        raise ValueError(
            f"device {device!r} cannot be used on this machine ({why}): pass one like cpu, cuda or cuda:1"
        ) from None
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used on this machine ({reason}): see `visattn doctor`") from None
    if target.type == "meta":
        raise ValueError(f"device {device!r} holds no numbers: pass one like cpu, cuda or cuda:1")
    return target


def chosen_device(device: str) -> str:
    """The device of this name, where "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: If it does not exist on this machine.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def environment() -> dict[str, Any]:
    """Versions, devices, backends and plug-ins, as `visattn doctor --json` prints them."""
    from visattn import backends, plugins
    from visattn.dispatch import load

    return {
        "system": platform.platform(),
        "versions": versions(),
        "devices": devices(),
        "backends": {
            name: {"available": ok, "reason": reason, "compiled": load(name).compiled()}
            for name, (ok, reason) in backends().items()
        },
        "plugins": [plugin._asdict() for plugin in plugins()],
    }
