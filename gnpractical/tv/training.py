"""A short training loop: SGD, warmup and a cosine, checkpoints, and a log."""

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
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter

from gnpractical.layers.pairing import norm_width
from gnpractical.measure.calibration import measured_norms
from gnpractical.runs.calibrate_measured import calibrate_measured
from gnpractical.runs.device import precision
from gnpractical.runs.output_dir import write_group_report
from gnpractical.tv.checkpoint import TorchvisionCheckpointer
from gnpractical.tv.datasets import CocoImages, collate
from gnpractical.tv.distributed import rank, world_size

logger = logging.getLogger(__name__)

PRINT_PERIOD = 20


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """SGD; the learning rate rises for ``warmup`` iterations and falls along half a cosine.

    ``batch_size`` is that of all processes together. The weights and biases of norms do not
    decay. Gradients are clipped to the norm ``clip_grad_norm``, 0 for not at all. With ``amp`` the
    forward pass is in mixed precision.
    """

    iterations: int = 270000
    batch_size: int = 16
    lr: float = 0.02
    warmup: int = 1000
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad_norm: float = 0.0
    checkpoint_period: int = 5000
    calibration_batches: int = 2
    workers: int = 2
    seed: int = 0
    amp: bool = False


def train(
    model: nn.Module,
    dataset: CocoImages,
    recipe: TrainingRecipe,
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
    optimizer = torch.optim.SGD(_parameter_groups(model), recipe.lr, recipe.momentum)
    autocast, scaler = precision(device, recipe.amp)
    checkpointer = TorchvisionCheckpointer(
        model,
        output_dir,
        mismatch=mismatch,
        save_to_disk=rank() == 0,
        optimizer=optimizer,
        **({"scaler": scaler} if scaler.is_enabled() else {}),
    )
    first = checkpointer.start(weights, resume)
    for group in optimizer.param_groups:  # a resumed run's own are of the checkpoint
        group["weight_decay"] = recipe.weight_decay if group["decays"] else 0.0
    saver = PeriodicCheckpointer(checkpointer, recipe.checkpoint_period, recipe.iterations)

    torch.manual_seed(recipe.seed + rank() + 1000 * first)
    batches = _batches(dataset, recipe, first)
    if measured_norms(model):
        few = list(itertools.islice(batches, recipe.calibration_batches))
        calibrate_measured(model, few, lambda m, batch: sum(m(*_to(batch, device)).values()))
        batches = itertools.chain(few, batches)
    if rank() == 0:
        write_group_report(model, output_dir)
    trained: nn.Module = model
    if world_size() > 1:
        trained = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    model.train()
    with _Metrics(output_dir, first, recipe.iterations) as metrics:
        for iteration in range(first, recipe.iterations):
            lr = recipe.lr * _lr_factor(recipe, iteration)
            for group in optimizer.param_groups:
                group["lr"] = lr
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
            if recipe.clip_grad_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            metrics.step(iteration, losses | {"total_loss": total}, lr)
            saver.step(iteration)
            metrics.restart_clock()


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    of_norms = {p for m in model.modules() if norm_width(m) is not None for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p not in of_norms], "decays": True},
        {"params": [p for p in trained if p in of_norms], "decays": False},
    ]


def _lr_factor(recipe: TrainingRecipe, iteration: int) -> float:
    warm = min(1.0, (iteration + 1) / (recipe.warmup + 1))
    return warm * (1 + math.cos(math.pi * iteration / recipe.iterations)) / 2


def _batches(dataset: CocoImages, recipe: TrainingRecipe, first: int) -> Iterator[Any]:
    """This process's part of every batch from iteration ``first`` on, without end."""
    loader = DataLoader(
        dataset,
        recipe.batch_size // world_size(),
        num_workers=recipe.workers,
        collate_fn=collate,
        sampler=_Shuffled(len(dataset), recipe.seed, first * recipe.batch_size),
    )
    return iter(loader)


class _Shuffled(Sampler[int]):
    """This process's share of an endless stream of shuffled epochs, from place ``start`` on.

    So that a run which is stopped and resumed sees what it would have seen.
    """

    def __init__(self, size: int, seed: int, start: int) -> None:
        self._size, self._seed, self._start = size, seed, start

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream(), rank(), None, world_size())

    def _stream(self) -> Iterator[int]:
        first, place = divmod(self._start, self._size)
        for epoch in itertools.count(first):
            generator = torch.Generator().manual_seed(1000 * self._seed + epoch)
            yield from torch.randperm(self._size, generator=generator).tolist()[place:]
            place = 0


def _to(batch: Any, device: torch.device) -> tuple[list, list]:
    images, targets = batch
    move = partial(torch.Tensor.to, device=device, non_blocking=True)
    return [move(image) for image in images], [
        {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]


class _Metrics:
    """Medians of 20 steps' losses and time, and ETA: to log, metrics.json and TensorBoard."""

    def __init__(self, output_dir: str, first: int, iterations: int) -> None:
        self._folder, self._first, self._iterations = output_dir, first, iterations
        self._writer: SummaryWriter | None = None
        # Of the last steps; losses stay on their device, so that nothing waits for it.
        self._times: deque[float] = deque(maxlen=PRINT_PERIOD)
        self._losses: deque[dict[str, torch.Tensor]] = deque(maxlen=PRINT_PERIOD)
        self.restart_clock()

    def __enter__(self) -> _Metrics:
        if rank() == 0:
            self._writer = SummaryWriter(self._folder, purge_step=self._first)
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
    line = {k: None if math.isnan(v) else v for k, v in values.items()}  # JSON has no nan
    with open(Path(output_dir, "metrics.json"), "a") as f:
        f.write(json.dumps({"iteration": iteration} | line) + "\n")
