"""Running a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Run = Callable[[nn.Module, Any], Any]


def run_forward(
    model: nn.Module, batches: Iterable[Any], run: Run | None, *, training: bool
) -> None:
    """One forward pass a batch, without gradients, in training or evaluation mode.

    Args:
        run: ``run(model, batch)`` runs the model. By default ``model(batch)``.

    Raises:
        TypeError, ValueError: ``batches`` are not a list of batches, or there is none.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list of batches, got {type(batches).__name__}")
    if run is not None and not callable(run):
        raise TypeError(f"run must be a function of the model and a batch, got {run!r}")
    batch = None
    with unchanged(model, training=training), torch.no_grad():
        for batch in batches:
            model(batch) if run is None else run(model, batch)
    if batch is None:
        raise ValueError("There are no batches; at least one is required.")


@contextlib.contextmanager
def unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Let ``model`` run in training or evaluation mode, and undo what that changes.

    Its modes, buffers and plain attributes are as before afterwards, also after an error, and so
    is the random state of Python and PyTorch. A model that is in training mode may hold modules
    that are not, and these stay so.
    """
    modules = list(model.modules())
    attributes = [_plain_attributes(module) for module in modules]
    buffers = [
        {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module.named_buffers(recurse=False)
            if not is_lazy(buffer)
        }
        for module in modules
    ]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    python_random = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            if not (training and model.training):
                model.train(training)
            yield
        finally:
            random.setstate(python_random)
            for module, plain, saved in zip(modules, attributes, buffers, strict=True):
                vars(module).update(plain)
                for name, (buffer, value) in saved.items():
                    buffer.data = value
                    setattr(module, name, buffer)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The mode, and what a forward pass may change, as RetinaNet's running normalizer."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}
