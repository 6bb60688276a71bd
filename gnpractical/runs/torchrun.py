"""Joining the processes that torchrun starts."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_torchrun(on_gpu: bool) -> None:
    """Join torchrun's other processes: with a GPU for each (NCCL), or on the CPU (gloo).

    Raises:
        ValueError: There are fewer GPUs than processes.
    """
    if on_gpu:
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(
                f"{processes} processes on this machine need as many GPUs; it has {gpus}. "
                f"Lower --nproc-per-node."
            )
        # Before a GPU is touched, or every process would take memory of the first.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")  # addresses from the environment
