"""A short training loop: SGD, warmup and a cosine, checkpoints, and a log."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from gnpractical.layers.pairing import norm_width
from gnpractical.measure.calibration import measured_norms
from gnpractical.runs.accumulation import Accumulated
from gnpractical.runs.calibrate_measured import calibrate_measured
from gnpractical.runs.carry_over import match_loaded
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

    Training stops after ``stop_at`` iterations if that is fewer, 0 for never, and can be resumed.
    ``batch_size`` is that of all processes together, and an iteration takes ``accumulate`` such
    batches, one after the other, for one step of the optimizer. The weights and biases of norms do
    not decay. Gradients are clipped to the norm ``clip_grad_norm``, 0 for not at all. With ``amp``
    the forward pass is in mixed precision.
    """

    iterations: int = 270000
    stop_at: int = 0
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 0.02
    warmup: int = 1000
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad_norm: float = 0.0
    checkpoint_period: int = 5000
    calibration_batches: int = 2
    match_batches: int = 0
    workers: int = 2
    seed: int = 0
    amp: bool = False

    @property
    def last_iteration(self) -> int:
        """The last one before the stop."""
        return min(self.stop_at or self.iterations, self.iterations) - 1


def train(
    model: nn.Module,
    dataset: CocoImages,
    recipe: TrainingRecipe,
    output_dir: str,
    *,
    weights: str = "",
    weights_backbone: str = "",
    resume: bool = False,
    mismatch: str = "error",
) -> None:
    """Train ``model`` in this and the other processes, and leave checkpoints in ``output_dir``.

    Before the first step calibrates GN_MEASURED norms, matches norms that begin with the weights of
    other norms if the recipe says so, and writes ``groups.json``. Every 20
    iterations the log, ``metrics.json`` and TensorBoard's events get a line.

    Args:
        model: Takes images and targets and gives a dict of losses. It is on its device.
        weights: A checkpoint to begin with, "" for none.
        weights_backbone: A file to take the backbone's weights from (see ``runs.pretrained``).
        resume: Go on from the last checkpoint in ``output_dir``, if there is one.
        mismatch: What other group counts in a checkpoint do, as in ``GroupCheckpointer``.

    Raises:
        FloatingPointError: The loss is not finite. The message names the last checkpoint.
        ValueError, OSError: A checkpoint cannot be loaded or written.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(_parameter_groups(model), recipe.lr, recipe.momentum)
    autocast, scaler = precision(device, recipe.amp)
    checkpointer = TorchvisionCheckpointer(
        model,
        output_dir,
        mismatch=mismatch,
        match=recipe.match_batches > 0,
        classes=dataset.classes,
        save_to_disk=rank() == 0,
        optimizer=optimizer,
        **({"scaler": scaler} if scaler.is_enabled() else {}),
    )
    first = checkpointer.start(weights, weights_backbone, resume)
    if first > recipe.iterations:
        raise ValueError(
            f"--iterations {recipe.iterations} must be at least the {first} that the checkpoint in "
            f"{output_dir!r} has"
        )
    for group in optimizer.param_groups:  # those of a resumed run came from its checkpoint
        group["weight_decay"] = recipe.weight_decay if group["decays"] else 0.0
    saver = PeriodicCheckpointer(checkpointer, recipe.checkpoint_period, recipe.iterations)

    torch.manual_seed(recipe.seed + rank() + 1000 * first)
    batches = _batches(dataset, recipe, first)
    if measured_norms(model):
        few = list(itertools.islice(batches, recipe.calibration_batches))
        calibrate_measured(model, few, lambda m, batch: m(*_to(batch, device)))
        batches = itertools.chain(few, batches)
    if checkpointer.other_norms.record and recipe.match_batches:
        few = list(itertools.islice(batches, recipe.match_batches))
        match_loaded(model, checkpointer.other_norms, few, lambda m, b: m(_to(b, device)[0]))
        batches = itertools.chain(few, batches)
    if rank() == 0:
        write_group_report(model, output_dir)
    trained: nn.Module = model
    if world_size() > 1:
        trained = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    trained = Accumulated(trained, scaler).train()
    steps: deque[dict[str, float]] = deque(maxlen=PRINT_PERIOD)
    writer = SummaryWriter(output_dir, purge_step=first) if rank() == 0 else None
    with writer or nullcontext():
        for iteration in range(first, recipe.last_iteration + 1):
            start = time.perf_counter()
            lr = recipe.lr * _lr_factor(recipe, iteration)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            with autocast:
                losses = trained([_to(next(batches), device) for _ in range(recipe.accumulate)])
                losses["total_loss"] = total = sum(losses.values())
            values = {name: loss.item() for name, loss in losses.items()}
            if not math.isfinite(values["total_loss"]):
                raise FloatingPointError(
                    f"The loss became {values['total_loss']} at iteration {iteration} ({values}). "
                    f"{checkpointer.last_good()} Try a lower --lr, a longer --warmup or "
                    f"--clip-grad-norm."
                )
            scaler.scale(total).backward()
            if recipe.clip_grad_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            steps.append(values | {"lr": lr, "time": time.perf_counter() - start})
            left = recipe.last_iteration - iteration
            if writer and (left == 0 or (iteration + 1) % PRINT_PERIOD == 0):
                _report(writer, iteration, left, steps)
            saver.step(iteration)
            if iteration == recipe.last_iteration < recipe.iterations - 1:
                checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


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
    start = first * recipe.accumulate * recipe.batch_size
    order = _shuffled(len(dataset), recipe.seed, start)
    loader = DataLoader(
        dataset,
        recipe.batch_size // world_size(),
        num_workers=recipe.workers,
        collate_fn=collate,
        sampler=itertools.islice(order, rank(), None, world_size()),
    )
    return iter(loader)


def _shuffled(size: int, seed: int, start: int) -> Iterator[int]:
    """An endless stream of shuffled epochs, from place ``start`` on.

    So a run that is stopped and resumed sees what it would have seen.
    """
    first, place = divmod(start, size)
    for epoch in itertools.count(first):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        yield from torch.randperm(size, generator=generator).tolist()[place:]
        place = 0


def _to(batch: Any, device: torch.device) -> tuple[list, list]:
    images, targets = batch
    return [image.to(device) for image in images], [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]


def _report(
    writer: SummaryWriter, iteration: int, left: int, steps: Sequence[dict[str, float]]
) -> None:
    """Log medians of the last ``steps`` and the time that the ``left`` ones will take."""
    values = {name: statistics.median_low(step[name] for step in steps) for name in steps[-1]}
    values["lr"] = steps[-1]["lr"]
    _write(writer, iteration, values)
    eta = timedelta(seconds=int(values["time"] * left))
    text = "  ".join(f"{name}: {value:.4g}" for name, value in values.items())
    if torch.cuda.is_available():
        text += f"  max_mem: {torch.cuda.max_memory_allocated() // 2**20}M"
    logger.info("eta: %s  iter: %d  %s", eta, iteration, text)


def write_scores(output_dir: str, iteration: int, scores: dict[str, float]) -> None:
    """Append an evaluation's scores to metrics.json and TensorBoard's events."""
    with SummaryWriter(output_dir) as writer:
        _write(writer, iteration, scores)


def _write(writer: SummaryWriter, iteration: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, iteration)
    line = {k: None if math.isnan(v) else v for k, v in values.items()}  # JSON has no nan
    with open(Path(writer.get_logdir(), "metrics.json"), "a") as f:
        f.write(json.dumps({"iteration": iteration} | line) + "\n")
