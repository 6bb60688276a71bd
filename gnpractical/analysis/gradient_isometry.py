"""The gradient's variance across every unit block of a real model, measured on real data.

A unit block is weight layer -> norm -> activation. Its K is the variance of dL/dx at the weight
layer's input, of what flows back through this layer alone, over the variance of dL/dx at the
activation's output, or at the norm's where no activation follows directly (before a residual
addition, for example). 1 is isometric; Definition 1 of arXiv 2302.03193.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.analysis.unit_blocks import BlockCall, Loss, run_batches, unit_blocks
from gnpractical.layers.pairing import NormPair, layer_widths, norm_width


@dataclass(frozen=True)
class BlockGradient:
    """What was measured of one unit block.

    Attributes:
        name: path of the norm; ``layer`` is the path of the weight layer that feeds it.
        in_channels, out_channels: widths of the weight layer.
        num_groups: G; None for norms without groups.
        activation: the activation that follows the norm directly, such as "relu", or None.
        input_variance, output_variance: of the gradient at the block's two ends, over all
            elements, calls and batches; None where nothing could be measured.
        left_out: calls left out because a gradient was not finite or zero throughout.
        reason: why nothing could be measured, "" where something was.
    """

    name: str
    layer: str
    in_channels: int
    out_channels: int
    num_groups: int | None
    activation: str | None
    input_variance: float | None
    output_variance: float | None
    left_out: int
    reason: str

    @property
    def ratio(self) -> float | None:
        """K, measured."""
        if self.input_variance is None or self.output_variance is None:
            return None
        return self.input_variance / self.output_variance


def measure_gradient_variance(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> list[BlockGradient]:
    """Measure K of every unit block of ``model``, in registration order.

    A block that runs several times (a head shared by feature levels) is measured over all its
    calls. Takes one forward and one backward pass a batch, the latter without weight gradients,
    and holds the gradients of all blocks at once.

    Args:
        model: any model; it runs in training mode.
        batches: what ``loss`` takes, one after the other.
        loss: ``loss(model, batch)`` gives a scalar. By default ``model(batch)``, if that is a
            scalar or a dict of scalar losses, as of Detectron2's models.

    Raises:
        ValueError: no unit block, no batches, batch and model on different devices, or a loss
            that is no finite scalar.
    """
    blocks = {pair.norm: _Block(pair) for pair in unit_blocks(model)}
    with contextlib.closing(run_batches(model, batches, loss)) as runs:
        for calls in runs:
            for call in calls:
                blocks[call.pair.norm].add(call)
    return [block.result() for block in blocks.values()]


class PooledVariance:
    """Biased variance over the elements of several tensors."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        variance, mean = torch.var_mean(values.detach().float(), correction=0)
        self.add_moments(values.numel(), mean.item(), variance.item())

    def add_moments(self, count: int, mean: float, variance: float) -> None:
        self._count += count
        self._sum += count * mean
        self._squares += count * (variance + mean * mean)

    def value(self) -> float | None:
        if not self._count:
            return None
        return self._squares / self._count - (self._sum / self._count) ** 2


def usable(gradient: Tensor) -> bool:
    """Whether ``gradient`` can enter a ratio: finite, and not the same value throughout."""
    return bool(torch.isfinite(gradient).all()) and bool((gradient != gradient.flatten()[:1]).any())


@dataclass
class _Block:
    """Sums up the calls of one unit block."""

    pair: NormPair
    activation: str | None = None
    left_out: int = 0
    calls: int = 0
    input: PooledVariance = field(default_factory=PooledVariance)
    output: PooledVariance = field(default_factory=PooledVariance)

    def add(self, call: BlockCall) -> None:
        assert call.input_grad is not None and call.output_grad is not None
        self.activation = call.activation_name
        self.calls += 1
        if usable(call.input_grad) and usable(call.output_grad):
            self.input.add(call.input_grad)
            self.output.add(call.output_grad)
        else:
            self.left_out += 1

    def result(self) -> BlockGradient:
        assert self.pair.layer_name is not None and self.pair.layer is not None
        widths = layer_widths(self.pair.layer)
        assert widths is not None
        reason = ""
        if not self.calls:
            reason = "it did not run, or no gradient reaches it"
        elif self.left_out == self.calls:
            reason = "its gradients are not finite or zero throughout"
        return BlockGradient(
            name=self.pair.norm_name,
            layer=self.pair.layer_name,
            in_channels=widths[0],
            out_channels=norm_width(self.pair.norm) or widths[1],
            num_groups=getattr(self.pair.norm, "num_groups", None),
            activation=self.activation,
            input_variance=self.input.value(),
            output_variance=self.output.value(),
            left_out=self.left_out,
            reason=reason,
        )
