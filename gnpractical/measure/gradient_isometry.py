"""The gradient's variance across every unit block of a real model, measured on real data.

A unit block is weight layer -> norm -> activation. Its K is Var(dL/dx) / Var(dL/dz); 1 is
isometric. Definition 1 of arXiv 2302.03193.

* x is the weight layer's input. Only the gradient that flows back through this norm and this layer
  counts, not what reaches x by a shortcut.
* z is the activation's output, or the norm's where no activation follows directly, as before a
  residual addition.

Which layer that is, ``layers.data_flow`` says. What else lies between it and the norm (pooling, a
residual addition) is part of the block. Layers whose outputs are concatenated are one layer, its
input all of theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.layers.data_flow import Source
from gnpractical.layers.pairing import norm_width
from gnpractical.measure.unit_blocks import BlockCall, Loss, find_norms, run_batches


@dataclass(frozen=True)
class BlockGradient:
    """What was measured of one unit block.

    Attributes:
        name: path of the norm.
        layer: path of the weight layer that feeds it, of several if there were; "" if none.
        in_channels, out_channels: width of that layer's input (of the first call, and added up
            where several are concatenated), and of the norm.
        num_groups: G; None for norms without groups.
        activation: the activation that follows the norm directly, such as "relu", or None.
        input_variance, output_variance: of the gradient at the block's two ends, over all
            elements, calls and batches; None where nothing could be measured.
        skipped_calls: calls left out because a gradient was not finite or zero throughout.
        skipped_reason: why nothing could be measured, "" where something was.
    """

    name: str
    layer: str
    in_channels: int | None
    out_channels: int
    num_groups: int | None
    activation: str | None
    input_variance: float | None
    output_variance: float | None
    skipped_calls: int
    skipped_reason: str

    @property
    def ratio(self) -> float | None:
        """K, measured."""
        if not self.input_variance or not self.output_variance:
            return None
        return self.input_variance / self.output_variance


def measure_gradient_variance(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> list[BlockGradient]:
    """Measure K of every unit block of ``model``, in registration order.

    A block that runs several times (a head shared by feature levels) is measured over all its
    calls. Takes one forward and one backward pass a batch, the latter without weight gradients,
    and holds the gradients of all blocks at once. A norm that gets something else than one layer's
    output, or shares it, takes its layers' input gradients besides; in a DenseNet, where most norms
    have many, this is several times the rest. Layers inside a reentrant
    ``torch.utils.checkpoint`` cannot be measured; with ``use_reentrant=False`` they can.

    Args:
        model: any model; it runs in training mode.
        batches: what ``loss`` takes, one after the other.
        loss: ``loss(model, batch)`` gives a scalar. By default ``model(batch)``, if that is a
            scalar or a dict of scalar losses, as of Detectron2's models.

    Raises:
        TypeError: ``batches`` or ``loss`` is of the wrong kind.
        ValueError: no norm, no batches, batch and model on different devices, or a loss that is
            no finite scalar with a gradient.
    """
    names = find_norms(model)
    blocks = {norm: _Block(norm) for norm in names}
    with contextlib.closing(run_batches(model, batches, loss)) as runs:
        for calls in runs:
            for call in calls:
                blocks[call.norm].add(call)
    return [block.result(names[norm]) for norm, block in blocks.items()]


def mean_abs_log(blocks: Iterable[BlockGradient]) -> float:
    """Mean |log K| over the blocks that were measured: 0 if all are isometric, nan without any."""
    logs = [abs(math.log(block.ratio)) for block in blocks if block.ratio]
    return sum(logs) / len(logs) if logs else math.nan


def agreement(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How well predicted K agrees with measured K, for pairs of both.

    Returns:
        The correlation of their logarithms and the median of |predicted / measured - 1|; nan for
        fewer than two pairs. Pairs with a value that is infinite or zero are left out.
    """
    pairs = [pair for pair in pairs if all(0 < value < math.inf for value in pair)]
    if len(pairs) < 2:
        return math.nan, math.nan
    logs = torch.tensor(pairs, dtype=torch.float64).log()
    error = (logs[:, 0] - logs[:, 1]).expm1().abs().median()
    return torch.corrcoef(logs.T)[0, 1].item(), error.item()


class PooledVariance:
    """Biased variance over the elements of several tensors, by Chan's formula."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        # In float64: the square of a vanishing gradient is 0 in float32.
        variance, mean = (t.item() for t in torch.var_mean(values.detach().double(), correction=0))
        count = values.numel()
        total = self._count + count
        if total:
            difference = mean - self._mean
            self._squares += count * variance + difference**2 * self._count * count / total
            self._mean += difference * count / total
            self._count = total

    def value(self) -> float | None:
        return self._squares / self._count if self._count else None


def usable(gradients: Sequence[Tensor]) -> bool:
    """Whether they can enter a ratio: some, finite, and not the same value throughout."""
    return all(bool(torch.isfinite(g).all()) for g in gradients) and any(
        bool((g != g.flatten()[:1]).any()) for g in gradients
    )


class _Block:
    """Sums up the calls of one norm."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.sources: list[Source] = []
        self.activation: str | None = None
        self.skipped_calls = 0
        self.calls = 0
        self.input, self.output = PooledVariance(), PooledVariance()

    def add(self, call: BlockCall) -> None:
        self.activation = call.activation.name if call.activation else None
        self.calls += 1
        if call.fed.source.layers not in [source.layers for source in self.sources]:
            self.sources.append(call.fed.source)
        gradients = call.input_gradients()
        if usable(gradients) and usable([call.output_grad]):
            for gradient in gradients:
                self.input.add(gradient)
            self.output.add(call.output_grad)
        else:
            self.skipped_calls += 1

    def result(self, name: str) -> BlockGradient:
        reason = ""
        if not self.calls:
            reason = "it did not run, gets no weight layer's output, or no gradient reaches it"
        elif self.skipped_calls == self.calls:
            reason = "its gradients are not finite, zero throughout, or do not reach its layers"
        return BlockGradient(
            name=name,
            layer=", ".join(layer for source in self.sources for layer in source.layers),
            in_channels=self.sources[0].in_channels if self.sources else None,
            out_channels=norm_width(self.norm) or 0,
            num_groups=getattr(self.norm, "num_groups", None),
            activation=self.activation,
            input_variance=self.input.value(),
            output_variance=self.output.value(),
            skipped_calls=self.skipped_calls,
            skipped_reason=reason,
        )
