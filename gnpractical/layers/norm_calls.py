"""Which weight layers feed each norm, found by running the model on example inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.layers.data_flow import DataFlow, Source, tensors_in
from gnpractical.layers.unchanged import unchanged


@dataclass
class NormCalls:
    """The calls of one norm.

    Attributes:
        sources: of its inputs, each once; None for an input that no weight layer has touched.
        positions: the smallest number of values a channel of its inputs had, such as H W.
    """

    sources: list[Source | None]
    positions: int


def trace_norms(model: nn.Module, example_inputs: Any) -> dict[nn.Module, NormCalls]:
    """The calls of every norm that runs.

    Args:
        model: runs once, in evaluation mode and without gradients; unchanged afterwards.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: the model could not run on these inputs; the message has PyTorch's.
    """
    args: tuple = (example_inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    tracer = _Tracer(model)
    with unchanged(model, training=False), torch.no_grad(), tracer:
        try:
            model(*args, **kwargs)
        except Exception as e:  # whatever the model's own code raises
            reason = next(iter(str(e).splitlines()), "").rstrip(".")
            shapes = [tuple(tensor.shape) for tensor in tensors_in(example_inputs)]
            raise ValueError(
                f"{type(model).__name__} cannot run on the example inputs "
                f"({type(example_inputs).__name__}, tensors of shape {shapes}): "
                f"{type(e).__name__}: {reason}. Its forward takes "
                f"{inspect.signature(model.forward)}; give a tensor, a tuple of positional "
                f"arguments or a dict of keyword arguments."
            ) from e
    return tracer.found


class _Tracer(DataFlow):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[nn.Module, NormCalls] = {}

    def at_norm(self, norm: nn.Module, y: Tensor, source: Source | None) -> Tensor:
        positions = math.prod(y.shape[2:])
        calls = self.found.setdefault(norm, NormCalls([], positions))
        calls.positions = min(calls.positions, positions)
        if source not in calls.sources:
            calls.sources.append(source)
        return y
