"""The processes that torchrun starts, or the one that is alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gnpractical.runs.device import resolve_device
from gnpractical.runs.torchrun import join_torchrun, under_torchrun


def start(name: str | None) -> torch.device:
    """Join torchrun's other processes, if there are any, and return the device of this one.

    Args:
        name: The name of the device, as ``resolve_device`` takes it.

    Raises:
        ValueError: There is no such device, or there are fewer GPUs than processes.
    """
    if under_torchrun():
        if name and ":" in name:
            raise ValueError(
                f"--device {name}: torchrun's processes each take their own; use "
                f"--device {name.split(':')[0]}"
            )
        join_torchrun(name in (None, "cuda") and torch.cuda.is_available())
    return resolve_device(name)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        with torch.inference_mode(False):  # in which older versions of PyTorch cannot gather
            dist.all_gather_object(values, value)
    return values
