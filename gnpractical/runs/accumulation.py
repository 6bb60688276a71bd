"""Steps of several batches, for models without batch statistics the same as of one large batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Accumulated(nn.Module):
    """A model that takes several batches and gives the mean of their losses.

    It has run the backward pass of all batches but the last when it returns, so that the memory is
    that of one; the caller runs that of the loss that it gets, without clearing gradients in
    between. Outside training it is the model itself.

    Args:
        model: Takes what a batch has, and gives a dict of losses. It may be wrapped for DDP, whose
            processes then exchange gradients once a step.
        scaler: Of mixed precision, that of the caller.
    """

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler) -> None:
        super().__init__()
        self.model, self.scaler = model, scaler

    def forward(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        if not self.training:
            return self.model(batches)
        *others, last = batches
        done: list[dict[str, Tensor]] = []
        for batch in others:
            with getattr(self.model, "no_sync", nullcontext)():
                losses = self.model(*batch)
                total = sum(losses.values()) / len(batches)
                with torch.autocast(total.device.type, enabled=False):
                    self.scaler.scale(total).backward()
            done.append({name: loss.detach() for name, loss in losses.items()})
        losses = self.model(*last)
        return {
            name: (loss + sum(d[name] for d in done)) / len(batches)
            for name, loss in losses.items()
        }


class Grouped:
    """So many batches of a loader at a time, each as the arguments of a call."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[list[tuple]]:
        batches = iter(self.loader)
        while True:
            try:
                yield [(next(batches),) for _ in range(self.count)]
            except StopIteration:
                return
