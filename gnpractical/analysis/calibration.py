"""Group counts chosen by measuring: for each norm the divisor whose K is closest to 1 in log.

K (see ``gradient_isometry``) of a candidate G follows from what one pass recorded of the layer:
the norm's input, the gradient at the block's output, and the graph of the weight layer between.
So all candidates of all layers are evaluated from one forward and one backward pass, at the price
of each candidate's norm and of the weight layer's input gradient, instead of a pass of the whole
model each. A choice changes what later and earlier layers see; the pass is therefore repeated with
the new counts, and only the divisors next to each, until none changes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.analysis.gradient_isometry import PooledVariance, usable
from gnpractical.analysis.unit_blocks import BlockCall, Loss, run_batches
from gnpractical.layers.group_norm import MEASURED, PracticalGroupNorm
from gnpractical.layers.pairing import find_pairs
from gnpractical.num_groups import divisors, practical_num_groups


@dataclass(frozen=True)
class MeasuredGroups:
    """What calibration chose for one norm.

    Attributes:
        name: path of the norm.
        num_groups: the choice.
        ratios: K of every candidate, by number of groups, each from the last pass that evaluated
            it; empty where nothing could be measured, and then the choice is Algorithm 1's.
        left_out: calls left out because a gradient was not finite or zero throughout.
    """

    name: str
    num_groups: int
    ratios: dict[int, float]
    left_out: int

    @property
    def isometric_between(self) -> bool:
        """Whether K = 1 lies between the lowest and the highest K of the candidates."""
        return bool(self.ratios) and min(self.ratios.values()) <= 1 <= max(self.ratios.values())


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    max_passes: int = 4,
    until_stable: bool = True,
) -> list[MeasuredGroups]:
    """Choose the group count of every norm of ``model`` whose rule is ``"measured"``, in place.

    Args:
        model: any model; it runs in training mode.
        batches: a few batches as in training; each is used in every pass.
        loss: ``loss(model, batch)`` gives a scalar; by default as ``measure_gradient_variance``.
        max_passes: how often at most all batches are run.
        until_stable: stop when no count changes. Without it every process of a distributed model
            runs equally many passes, as layers that synchronize require.

    Returns:
        One row for every measured norm, in registration order.

    Raises:
        ValueError: no such norm; one without a known weight layer; and as
            ``measure_gradient_variance``. After any error the model is as it was.
    """
    norms = measured_norms(model)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm with the rule 'measured' (GN_MEASURED) to "
            f"calibrate."
        )
    batches = list(batches)
    before = {norm: norm.num_groups for norm in norms.values()}
    try:
        for norm in norms.values():
            if norm.in_channels is None:
                raise ValueError(
                    f"a norm of {norm.num_channels} channels has the rule 'measured' but no known "
                    f"weight layer: call resolve(in_channels=...) on it."
                )
            norm.num_groups = practical_num_groups(norm.in_channels, norm.num_channels)
        layers = {norm: _Candidates(norm) for norm in norms.values()}
        for _ in range(max_passes):
            _evaluate(model, batches, loss, layers)
            changed = False
            for norm, candidates in layers.items():
                changed |= norm.num_groups != candidates.best()
                norm.num_groups = candidates.best()
                candidates.narrow()
            if until_stable and not changed:
                break
    except BaseException:
        for norm, before_it in before.items():
            norm.num_groups = before_it
        raise
    return [
        MeasuredGroups(name, norm.num_groups, layers[norm].ratios(), layers[norm].left_out)
        for name, norm in norms.items()
    ]


def measured_norms(model: nn.Module) -> dict[str, PracticalGroupNorm]:
    """The norms of ``model`` whose rule is ``"measured"``, by path."""
    return {
        pair.norm_name: pair.norm
        for pair in find_pairs(model)
        if isinstance(pair.norm, PracticalGroupNorm) and pair.norm.rule == MEASURED
    }


class _Candidates:
    """K of the possible numbers of groups of one norm, over its calls."""

    def __init__(self, norm: PracticalGroupNorm) -> None:
        self.norm = norm
        self.left_out = 0
        self._earlier: dict[int, float] = {}
        self._start(divisors(norm.num_channels))

    def _start(self, counts: Iterable[int]) -> None:
        self._output = PooledVariance()
        self._inputs = {num_groups: PooledVariance() for num_groups in counts}

    def narrow(self) -> None:
        """Begin a pass over the present count and its neighbours only."""
        self._earlier = self.ratios()
        counts = divisors(self.norm.num_channels)
        at = counts.index(self.norm.num_groups)
        self._start(counts[max(0, at - 1) : at + 2])

    def add(self, call: BlockCall) -> None:
        assert call.output_grad is not None
        values = call.norm_input[0].numel()
        gradients = {
            num_groups: self._input_gradient(call, num_groups)
            for num_groups in self._inputs
            if num_groups < values  # else single values: see PracticalGroupNorm
        }
        if not all(map(usable, (call.output_grad, *gradients.values()))):
            self.left_out += 1
            return
        self._output.add(call.output_grad)
        for num_groups, gradient in gradients.items():
            self._inputs[num_groups].add(gradient)

    def _input_gradient(self, call: BlockCall, num_groups: int) -> Tensor:
        """dL/dx at the weight layer's input, were the norm's count ``num_groups``."""
        norm = self.norm
        y = call.norm_input.detach().requires_grad_()
        with torch.enable_grad():
            z = torch.group_norm(y, num_groups, norm.weight, norm.bias, norm.eps)
            out = call.activation(z) if call.activation else z
        (y_grad,) = torch.autograd.grad(out, y, call.output_grad)
        (x_grad,) = torch.autograd.grad(call.norm_input, call.input, y_grad, retain_graph=True)
        return x_grad

    def ratios(self) -> dict[int, float]:
        scale = self._output.value()
        now = {g: v / scale for g, p in self._inputs.items() if (v := p.value()) and scale}
        return dict(sorted((self._earlier | now).items()))

    def best(self) -> int:
        # The larger on a tie, as in the other rules.
        return min(
            self.ratios().items(),
            key=lambda item: (abs(math.log(item[1])), -item[0]),
            default=(self.norm.num_groups, 0),
        )[0]


def _evaluate(
    model: nn.Module,
    batches: list[Any],
    loss: Loss | None,
    layers: dict[PracticalGroupNorm, _Candidates],
) -> None:
    with contextlib.closing(run_batches(model, batches, loss)) as runs:
        for calls in runs:
            for call in calls:
                norm = call.pair.norm
                if isinstance(norm, PracticalGroupNorm) and norm in layers:
                    layers[norm].add(call)
