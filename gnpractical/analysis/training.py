"""Training a classifier: SGD and a cosine, mixed precision, a checkpoint after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnpractical.analysis.output_dir import write_atomically

Batches = Collection[tuple[Tensor, Tensor]]  # a DataLoader, or a list


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; the learning rate falls from ``lr`` to 0 along half a cosine."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float


@dataclass
class History:
    """What training leaves behind: one entry an epoch, test errors in %."""

    train_losses: list[float] = field(default_factory=list)
    test_errors: list[float] = field(default_factory=list)
    seconds: float = 0.0


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"--device must be a device of this machine, got {name!r} "
            f"({first_line(e)}). Use --device cpu."
        ) from None


def fit(
    model: nn.Module,
    train_batches: Batches,
    test_batches: Batches,
    recipe: Recipe,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    mixed_precision: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[int], object] = lambda steps: None,
) -> History:
    """Train a classifier and test it after every epoch.

    The random state is set from (seed, epoch) before each epoch, so that an interrupted run goes
    on exactly as it would have, and all rows of a seed see the same batches.

    Args:
        mixed_precision: on a GPU, bfloat16, or float16 and a gradient scaler where it has none.
        checkpoint: keeps the state of the run after every epoch; resumed from if it exists.
        on_step: called with the number of training steps done since the last call.

    Raises:
        ValueError: ``checkpoint`` is not a checkpoint of this run.
    """
    device = torch.device(device)
    model.to(device)
    autocast, scaler = precision(device, mixed_precision and device.type == "cuda")
    # One kernel for all parameters: on small models the optimizer is a tenth of a step.
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = History()
    if checkpoint is not None and checkpoint.exists():
        history = _load_checkpoint(checkpoint, parts, seed)
        on_step(len(history.train_losses) * len(train_batches))
    total_steps = recipe.epochs * len(train_batches)
    for epoch in range(len(history.train_losses), recipe.epochs):
        start = time.perf_counter()
        torch.manual_seed(1000 * (seed + 1) + epoch)
        model.train()
        loss_sum, count = torch.zeros((), device=device), 0
        for step, (inputs, targets) in enumerate(train_batches, epoch * len(train_batches)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / total_steps)) / 2
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
            on_step(1)
        history.train_losses.append(loss_sum.item() / count)
        with autocast:
            history.test_errors.append(error_rate(model, test_batches, device))
        history.seconds += time.perf_counter() - start
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"seed": seed, "history": vars(history)}
            write_atomically(checkpoint, partial(torch.save, state))
    return history


def precision(
    device: torch.device, mixed: bool
) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """For mixed precision bfloat16, or float16 with scaled losses where a GPU has no bfloat16."""
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if native else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=mixed and not native)
    return torch.autocast(device.type, dtype, enabled=mixed), scaler


@torch.inference_mode()
def error_rate(model: nn.Module, batches: Batches, device: torch.device | str = "cpu") -> float:
    """Percentage of wrong answers."""
    model.eval()
    wrong, count = torch.zeros((), dtype=torch.long, device=device), 0
    for inputs, targets in batches:
        answers = model(inputs.to(device, non_blocking=True)).argmax(1)
        wrong += (answers != targets.to(device, non_blocking=True)).sum()
        count += len(targets)
    return 100 * wrong.item() / count


def _load_checkpoint(path: Path, parts: Mapping[str, Any], seed: int) -> History:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["seed"] != seed:
            raise ValueError(f"it is of seed {state['seed']}, not {seed}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return History(**state["history"])
    except Exception as e:  # torch.load raises whatever a damaged file makes it raise
        raise ValueError(
            f"{path} must be a checkpoint of this run, but it cannot be used ({first_line(e)}). "
            f"Remove it to start this run again."
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
