"""Running a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


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
