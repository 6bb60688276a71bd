"""Which weight layers feed each norm, found by running the model on example inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.layers.data_flow import DataFlow, Source, tensors_in
from gnpractical.layers.group_norm import PracticalGroupNorm
from gnpractical.layers.pairing import find_pairs, layer_widths, norm_width
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
        for module in model.modules():
            if isinstance(module, PracticalGroupNorm) and module.num_groups is None:
                module.num_groups = 1  # the count that runs on every input
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


def feeding_sources(
    model: nn.Module, calls: dict[nn.Module, NormCalls]
) -> dict[nn.Module, tuple[Source | None, str]]:
    """For every norm the layers that feed it, or None and why they are not known."""
    feeding: dict[nn.Module, tuple[Source | None, str]] = {}
    for pair in find_pairs(model):
        norm = pair.norm
        if norm in calls:
            feeding[norm] = _one_source(calls[norm].sources, norm_width(norm))
            continue
        widths = [width for layer in pair.layers.values() if (width := layer_widths(layer))]
        # Several layers may be concatenated, or take turns; who resolved the norm knows.
        in_channels = getattr(norm, "in_channels", None) or sum(width[0] for width in widths)
        source = Source(in_channels, norm_width(norm) or 0, tuple(pair.layers), 0, 0)
        feeding[norm] = source if widths else None, "no layer before it in its module feeds it"
    return feeding


def _one_source(
    sources: list[Source | None], num_channels: int | None
) -> tuple[Source | None, str]:
    known = [source for source in sources if source]
    if len(known) < len(sources):
        return None, "what reaches it comes from no weight layer, or from an operation not known"
    first = known[0]
    if len({source.in_channels for source in known}) > 1:
        return None, "it is called several times, after layers of different input widths"
    if first.out_channels != num_channels:
        return None, (
            f"what reaches it comes from {first.out_channels} output channels "
            f"({', '.join(first.layers[:3])}), not from its own number"
        )
    layers = dict.fromkeys(layer for source in known for layer in source.layers)
    return replace(first, layers=tuple(layers)), ""


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
