"""Training a classifier: SGD and a cosine, mixed precision, a checkpoint after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gnpractical.runs.device import precision
from gnpractical.runs.errors import first_line
from gnpractical.runs.group_record import group_record, take_recorded
from gnpractical.runs.output_dir import write_atomically

Batches = Collection[tuple[Tensor, Tensor]]  # a DataLoader, or a list


@dataclass
class History:
    """What one run leaves behind, with one entry for each epoch. Test errors are in %."""

    train_losses: list[float] = field(default_factory=list)
    test_errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def test_error(self) -> float:
        """The result of the run: the last epoch's test error, never the best epoch's."""
        return self.test_errors[-1]


def fit(
    model: nn.Module,
    train_batches: Batches,
    test_batches: Batches,
    seed: int,
    checkpoint: Path,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    mixed: bool = False,
    stop_at: int | None = None,
) -> History:
    """Train a classifier on the device it is on, and test it after every epoch.

    The learning rate falls from ``lr`` to 0 along half a cosine. The random state is set from
    (seed, epoch) before each epoch, so that an interrupted run goes on exactly as it would have,
    and all rows of a seed see the same batches.

    Args:
        checkpoint: Keeps the state of the run after every epoch, and is resumed from if it exists.
        stop_at: After how many epochs of the schedule to stop, to be resumed; None for its end.
        mixed: Train in mixed precision, of bfloat16 or what else the GPU has.

    Raises:
        ValueError: ``checkpoint`` is not a checkpoint of this run.
    """
    device = next(model.parameters()).device
    autocast, scaler = precision(device, mixed)
    # One kernel for all parameters: on small models the optimizer is a tenth of a step.
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = _load_checkpoint(checkpoint, parts) if checkpoint.exists() else History()
    total_steps = epochs * len(train_batches)
    step = len(history.train_losses) * len(train_batches)
    with tqdm(total=total_steps, initial=step, unit="step", leave=False, disable=None) as bar:
        for epoch in range(len(history.train_losses), min(stop_at or epochs, epochs)):
            start = time.perf_counter()
            torch.manual_seed(1000 * (seed + 1) + epoch)
            model.train()
            loss_sum, count = torch.zeros((), device=device), 0
            for inputs, targets in train_batches:
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / total_steps)) / 2
                inputs = inputs.to(device, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
                with autocast:
                    loss = F.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                loss_sum += loss.detach() * len(targets)  # no .item(): it would wait for the GPU
                count += len(targets)
                step += 1
                bar.update()
            history.train_losses.append(loss_sum.item() / count)
            with autocast:
                history.test_errors.append(error_rate(model, test_batches, device))
            history.seconds += time.perf_counter() - start
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"groups": group_record(model), "history": vars(history)}
            write_atomically(checkpoint, partial(torch.save, state))
    return history


@torch.inference_mode()
def error_rate(model: nn.Module, batches: Batches, device: torch.device | str = "cpu") -> float:
    """Return the percentage of wrong answers."""
    model.eval()
    wrong, count = torch.zeros((), dtype=torch.long, device=device), 0
    for inputs, targets in batches:
        answers = model(inputs.to(device, non_blocking=True)).argmax(1)
        wrong += (answers != targets.to(device, non_blocking=True)).sum()
        count += len(targets)
    return 100 * wrong.item() / count


def _load_checkpoint(path: Path, parts: Mapping[str, Any]) -> History:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        take_recorded(parts["model"], state["groups"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return History(**state["history"])
    except Exception as e:  # torch.load raises whatever a damaged file makes it raise
        raise ValueError(
            f"{path} must be a checkpoint of this run, but it cannot be used ({first_line(e)}). "
            f"Remove it to start this run again."
        ) from None
