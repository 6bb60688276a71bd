"""A short training loop: SGD, warmup and a cosine, checkpoints that are checked, and a log."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from gnpractical.analysis.checkpointer import GroupCheckpointer
from gnpractical.analysis.distributed_calibration import calibrate_measured
from gnpractical.analysis.group_record import Record
from gnpractical.analysis.output_dir import write_group_report
from gnpractical.layers.pairing import norm_width
from gnpractical.tv.datasets import collate
from gnpractical.tv.distributed import rank, world_size

logger = logging.getLogger(__name__)

PRINT_PERIOD = 20


@dataclass(frozen=True)
class Recipe:
    """SGD; the learning rate rises for ``warmup`` iterations and falls along half a cosine.

    ``batch_size`` is that of all processes together. The weights and biases of norms do not
    decay. Gradients are clipped to the norm ``clip_norm``, 0 for not at all.
    """

    iterations: int
    batch_size: int
    lr: float
    warmup: int = 1000
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    checkpoint_period: int = 5000
    calibration_batches: int = 2
    workers: int = 2
    seed: int = 0
    mixed_precision: bool = False


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    output_dir: str,
    *,
    weights: str = "",
    resume: bool = False,
    mismatch: str = "error",
) -> None:
    """Train ``model`` in this and the other processes, and leave checkpoints in ``output_dir``.

    Calibrates GN_MEASURED norms and writes ``groups.json`` before the first step; writes
    ``metrics.json`` (a line each 20 iterations) and TensorBoard's events on the way.

    Args:
        model: takes images and targets, gives a dict of losses; on its device.
        weights: a checkpoint to begin with, "" for none.
        resume: go on from the last checkpoint of ``output_dir``, if there is one.
        mismatch: of group counts, as of ``GroupCheckpointer``.

    Raises:
        FloatingPointError: the loss is not finite; the message names the last checkpoint.
        ValueError, OSError: as ``GroupCheckpointer``'s.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay), recipe.lr, recipe.momentum
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_lr_factor, recipe))
    # float16 needs its losses scaled; a CPU computes in bfloat16, which does not.
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=recipe.mixed_precision)
    scaled = recipe.mixed_precision and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    checkpointer = TorchvisionCheckpointer(
        model, output_dir, mismatch=mismatch, save_to_disk=rank() == 0,
        optimizer=optimizer, scheduler=scheduler, scaler=scaler,
    )  # fmt: skip
    resume = resume and checkpointer.has_checkpoint()
    state = checkpointer.resume_or_load(weights, resume=resume)
    first = state.get("iteration", -1) + 1 if resume else 0
    saver = PeriodicCheckpointer(checkpointer, recipe.checkpoint_period, recipe.iterations)

    torch.manual_seed(recipe.seed + rank() + 1000 * first)
    batches = _batches(dataset, recipe, first)
    few = list(itertools.islice(batches, recipe.calibration_batches))
    calibrate_measured(model, few, lambda m, batch: sum(m(*_to(batch, device)).values()))
    batches = itertools.chain(few, batches)
    if rank() == 0:
        write_group_report(model, output_dir)
    trained: nn.Module = model
    if world_size() > 1:
        trained = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    model.train()
    with _Metrics(output_dir, recipe.iterations) as metrics:
        for iteration in range(first, recipe.iterations):
            with autocast:
                losses = trained(*_to(next(batches), device))
                total = sum(losses.values())
            if not math.isfinite(total.item()):
                values = {name: loss.item() for name, loss in losses.items()}
                raise FloatingPointError(
                    f"The loss became {total.item()} at iteration {iteration} ({values}). "
                    f"{checkpointer.last_good()} Try a lower --lr, a longer --warmup or "
                    f"--clip-grad-norm."
                )
            optimizer.zero_grad()
            scaler.scale(total).backward()
            if recipe.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            metrics.step(iteration, losses | {"total_loss": total}, scheduler.get_last_lr()[0])
            scheduler.step()
            saver.step(iteration)
            metrics.restart_clock()


class TorchvisionCheckpointer(GroupCheckpointer):
    """The checkpointer of ``tools/train_torchvision.py``, whose options its errors name."""

    def advice(self, differing: list[str], record: Record) -> str:
        norms = sorted({record[name]["norm"] for name in differing})
        standardized = any(record[name]["weight_standardized"] for name in differing)
        return (
            f"The file's norms there are {', '.join(norms)}, with{'' if standardized else 'out'} "
            f"weight standardization: choose --norm and --weight-standardization to match, or load "
            f"it all the same with --checkpoint-mismatch warn."
        )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    of_norms = {p for m in model.modules() if norm_width(m) is not None for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p not in of_norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in of_norms], "weight_decay": 0.0},
    ]


def _lr_factor(recipe: Recipe, iteration: int) -> float:
    warm = min(1.0, (iteration + 1) / (recipe.warmup + 1))
    return warm * (1 + math.cos(math.pi * iteration / recipe.iterations)) / 2


def _batches(dataset: Dataset, recipe: Recipe, first: int) -> Iterator[Any]:
    """This process's part of every batch, shuffled anew each epoch, without end."""
    sampler: DistributedSampler = DistributedSampler(
        dataset, world_size(), rank(), seed=recipe.seed
    )
    loader = DataLoader(
        dataset, recipe.batch_size // world_size(), sampler=sampler, drop_last=True,
        num_workers=recipe.workers, collate_fn=collate,
        persistent_workers=recipe.workers > 0,
    )  # fmt: skip
    if not len(loader):
        raise ValueError(
            f"--batch-size {recipe.batch_size} must be at most the number of training images, "
            f"{len(dataset)}"  # type: ignore[arg-type]
        )
    for epoch in itertools.count(first // len(loader)):
        sampler.set_epoch(epoch)
        yield from loader


def _to(batch: Any, device: torch.device) -> tuple[list, list]:
    images, targets = batch
    move = partial(torch.Tensor.to, device=device, non_blocking=True)
    return [move(image) for image in images], [
        {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]


class _Metrics:
    """Losses, time (medians of 20 steps) and ETA to log, metrics.json and TensorBoard; of rank 0.
    """

    def __init__(self, output_dir: str, iterations: int) -> None:
        self._folder, self._iterations = output_dir, iterations
        self._writer: SummaryWriter | None = None
        # Of the last steps; losses stay on their device, so that nothing waits for it.
        self._times: deque[float] = deque(maxlen=PRINT_PERIOD)
        self._losses: deque[dict[str, torch.Tensor]] = deque(maxlen=PRINT_PERIOD)
        self.restart_clock()

    def __enter__(self) -> _Metrics:
        if rank() == 0:
            self._writer = SummaryWriter(self._folder)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer:
            self._writer.close()

    def restart_clock(self) -> None:
        """A step begins. (Writing a checkpoint belongs to none.)"""
        self._begun = time.perf_counter()

    def step(self, iteration: int, losses: dict[str, torch.Tensor], lr: float) -> None:
        self._times.append(time.perf_counter() - self._begun)
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        last = iteration + 1 == self._iterations
        if self._writer is None or not ((iteration + 1) % PRINT_PERIOD == 0 or last):
            return
        seconds = statistics.median(self._times)
        values = {
            name: torch.stack([step[name] for step in self._losses]).median().item()
            for name in losses
        }
        values |= {"lr": lr, "time": seconds}
        _append(self._folder, iteration, values)
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        eta = timedelta(seconds=int(seconds * (self._iterations - iteration - 1)))
        memory = ""
        if torch.cuda.is_available():
            memory = f"  max_mem: {torch.cuda.max_memory_allocated() // 2**20}M"
        rest = "  ".join(f"{k}: {v:.4g}" for k, v in values.items() if k != "time")
        logger.info("eta: %s  iter: %d  %s  time: %.4f%s", eta, iteration, rest, seconds, memory)


def write_scores(output_dir: str, iteration: int, scores: dict[str, float]) -> None:
    """Append an evaluation's scores to metrics.json and TensorBoard's events."""
    _append(output_dir, iteration, scores)
    with SummaryWriter(output_dir) as writer:
        for name, value in scores.items():
            writer.add_scalar(name, value, iteration)


def _append(output_dir: str, iteration: int, values: dict[str, float]) -> None:
    with open(Path(output_dir, "metrics.json"), "a") as f:
        f.write(json.dumps({"iteration": iteration} | values) + "\n")
