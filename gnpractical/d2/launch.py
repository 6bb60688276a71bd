"""Starting one or many processes, by Detectron2's own options or under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from gnpractical.runs.torchrun import join_torchrun, under_torchrun

Main = Callable[[argparse.Namespace, CfgNode], Any]


def launch(main: Main, args: argparse.Namespace, cfg: CfgNode) -> Any:
    """Run ``main(args, cfg)`` in every process that ``args`` or torchrun asks for.

    Without a GPU the processes run on the CPU (gloo), sharing its cores.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.
    """
    if under_torchrun():
        join_torchrun(torch.cuda.is_available())
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        results = _share_cores(main, args, cfg)
        # Only after success: the others may never come to tear down, and torchrun ends them.
        dist.destroy_process_group()
        return results
    try:
        return detectron2_launch(
            _share_cores,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args, cfg),
        )
    except ProcessExitedException as e:  # which has said why
        sys.exit(e.exit_code or 1)


def check_processes(args: argparse.Namespace) -> None:
    """ValueError for more processes than GPUs, or several machines without an address."""
    if under_torchrun():
        return
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus {args.num_gpus}: only {gpus} GPUs are visible")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            "--num-machines needs --dist-url tcp://<address of machine 0>:<free port>, the same "
            "on every machine"
        )


def _share_cores(main: Main, args: argparse.Namespace, cfg: CfgNode) -> Any:
    if not torch.cuda.is_available() and comm.get_local_size() > 1:
        # Two processes with a thread for every core each slow one another many times over.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.get_local_size()))
    return main(args, cfg)
