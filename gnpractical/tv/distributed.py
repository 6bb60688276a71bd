"""The processes that torchrun starts, or the one that is alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gnpractical.runs.device import resolve_device
from gnpractical.runs.torchrun import join_torchrun, under_torchrun


def start(name: str | None) -> torch.device:
    """Join torchrun's other processes, if there are any; the device of this one.

    Args:
        name: of the device, as ``resolve_device`` takes it.

    Raises:
        ValueError: no such device, or fewer GPUs than processes.
    """
    if not under_torchrun():
        return resolve_device(name)
    if name and ":" in name:
        raise ValueError(
            f"--device {name}: torchrun's processes each take their own; use "
            f"--device {name.split(':')[0]}"
        )
    join_torchrun(name in (None, "cuda") and torch.cuda.is_available())
    return resolve_device(name)


def stop() -> None:
    """Leave the others, after success: after an error they may never come to this point."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the other processes; torchrun ends the wait if one of them fails."""
    if world_size() > 1:
        dist.barrier()


def check_same(value: Any, message: str) -> None:
    """ValueError with ``message`` unless ``value`` is the same in every process."""
    if world_size() > 1:
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value)
        if any(v != value for v in values):
            raise ValueError(f"{message}; by process: {values}")


def gather(items: list[Any]) -> list[Any]:
    """Rank 0: the items of all processes, in the order of their ranks. The others: nothing."""
    if world_size() == 1:
        return items
    parts: list[list[Any]] | None = [[] for _ in range(world_size())] if rank() == 0 else None
    dist.gather_object(items, parts)
    return [item for part in parts or [] for item in part]
