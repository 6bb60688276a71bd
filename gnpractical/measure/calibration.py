"""Group counts chosen by measuring: for each norm the divisor whose K is closest to 1 in log.

K (see ``gradient_isometry``) of a candidate G follows from what one pass recorded of the layer:
the norm's input, the gradient at the block's output, and the graph between layer and norm. So all
candidates of all layers are evaluated from one forward and one backward pass, at the price of each
candidate's norm and of the input gradients of the layers that feed it, instead of a pass of the
whole model each. A choice changes what later and earlier layers see; the pass is therefore
repeated with the new counts, and only the divisors next to each, until none changes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.layers.group_norm import MEASURED, MIN_VALUES, PracticalGroupNorm
from gnpractical.layers.pairing import find_pairs
from gnpractical.measure.gradient_isometry import PooledVariance, usable
from gnpractical.measure.unit_blocks import BlockCall, Loss, run_batches
from gnpractical.num_groups import check_width, divisors, practical_num_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredGroups:
    """What calibration chose for one norm.

    Attributes:
        name: path of the norm.
        num_groups: the choice.
        ratios: K of every candidate, by number of groups, each from the last pass that evaluated
            it; empty where nothing could be measured, and then the choice is Algorithm 1's.
        skipped_calls: calls left out because a gradient was not finite or zero throughout.
    """

    name: str
    num_groups: int
    ratios: dict[int, float]
    skipped_calls: int

    @property
    def isometric_between(self) -> bool:
        """Whether K = 1 lies between the lowest and the highest K of the candidates."""
        return bool(self.ratios) and min(self.ratios.values()) <= 1 <= max(self.ratios.values())


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    only: Collection[str] | None = None,
    max_passes: int = 4,
    until_stable: bool = True,
) -> list[MeasuredGroups]:
    """Choose the group count of every norm of ``model`` whose rule is ``"measured"``, in place.

    Args:
        model: any model; it runs in training mode.
        batches: a few batches as in training; each is used in every pass.
        loss: ``loss(model, batch)`` gives a scalar; by default as ``measure_gradient_variance``.
        only: paths of the norms to choose for; None is all.
        max_passes: how often at most all batches are run.
        until_stable: stop when no count changes. Without it every process of a distributed model
            runs equally many passes, as layers that synchronize require.

    Returns:
        One row for every measured norm, in registration order.

    Raises:
        TypeError, ValueError: no such norm; one without a known weight layer; and as
            ``measure_gradient_variance``. After any error the model is as it was.
    """
    check_width("max_passes", max_passes)
    norms = {
        name: norm for name, norm in measured_norms(model).items() if only is None or name in only
    }
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm with the rule 'measured' (GN_MEASURED) to "
            f"calibrate."
        )
    if isinstance(batches, Iterable) and not isinstance(batches, Tensor | Mapping | str):
        batches = list(batches)  # else an error, of the first pass
    before = {norm: norm.num_groups for norm in norms.values()}
    layers = {norm: _Candidates(norm) for norm in norms.values()}
    try:
        for norm in norms.values():
            if norm.in_channels is None:
                raise ValueError(
                    f"a norm of {norm.num_channels} channels has the rule 'measured' but no known "
                    f"weight layer: call resolve(in_channels=...) on it."
                )
            norm.num_groups = 1  # the one count that runs on every input
        for number in range(max_passes):
            for candidates in layers.values() if number else ():
                candidates.narrow()
            _evaluate(model, batches, loss, layers)
            changed = False
            for norm, candidates in layers.items():
                best = candidates.best()
                changed |= norm.num_groups != best
                norm.num_groups = best
            if until_stable and not changed:
                break
    except BaseException:
        for norm, before_it in before.items():
            norm.num_groups = before_it
        raise
    rows = [
        MeasuredGroups(name, norm.num_groups, layers[norm].ratios(), layers[norm].skipped_calls)
        for name, norm in norms.items()
    ]
    unmeasured = [row.name for row in rows if not row.ratios]
    if unmeasured:
        logger.warning(
            "%d norms could not be measured (they did not run, get no weight layer's output, or "
            "had no finite, nonzero gradient) and have GN_PRACTICAL's number of groups: %s",
            *(len(unmeasured), ", ".join(unmeasured[:5])),
        )
    return rows


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
        self.skipped_calls = 0
        self._earlier: dict[int, float] = {}
        self._begin(divisors(norm.num_channels))

    def _begin(self, counts: Sequence[int]) -> None:
        self._output = PooledVariance()
        # At the input, by number of groups; one that a call could not run with is dropped.
        self._inputs = {count: PooledVariance() for count in counts}

    def narrow(self) -> None:
        """Begin a pass over the present count and its neighbours only."""
        self._earlier = self.ratios()
        counts = divisors(self.norm.num_channels)
        at = counts.index(self.norm.num_groups)
        self._begin(counts[max(0, at - 1) : at + 2])

    def add(self, call: BlockCall) -> None:
        values = call.fed.tensor[0].numel()
        found = {}
        for count in self._inputs if usable([call.output_grad]) else ():
            # Fewer values leave no gradient, or one whose variance is infinite.
            if count == 1 or values // count >= MIN_VALUES:
                gradients = self._input_gradients(call, count)
                if usable(gradients):
                    found[count] = PooledVariance()
                    for gradient in gradients:
                        found[count].add(gradient)
        if not found:
            self.skipped_calls += 1
            return
        self._output.add(call.output_grad)
        self._inputs = {c: variance for c, variance in self._inputs.items() if c in found}
        for count, variance in self._inputs.items():
            variance.merge(found[count])

    def _input_gradients(self, call: BlockCall, num_groups: int) -> list[Tensor]:
        """dL/dx at the weight layers' inputs, were the norm's count ``num_groups``."""
        norm = self.norm
        y = call.fed.tensor.detach().requires_grad_()
        with torch.enable_grad():
            z = torch.group_norm(y, num_groups, norm.weight, norm.bias, norm.eps)
            out = call.activation.function(z) if call.activation else z
        (y_grad,) = torch.autograd.grad(out, y, call.output_grad)
        return call.input_gradients(y_grad)

    def ratios(self) -> dict[int, float]:
        """K by number of groups, each from the last pass that evaluated it."""
        output = self._output.value()
        values = {count: variance.value() for count, variance in self._inputs.items()}
        now = {count: value / output for count, value in values.items() if value and output}
        return dict(sorted((self._earlier | now).items()))

    def best(self) -> int:
        """The count whose K is closest to 1; Algorithm 1's where none was measured."""
        ratios = self.ratios()
        if not ratios:
            assert self.norm.in_channels is not None
            return practical_num_groups(self.norm.in_channels, self.norm.num_channels)
        # The larger on a tie, as in the other rules.
        return min(ratios, key=lambda count: (abs(math.log(ratios[count])), -count))


def _evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    layers: dict[PracticalGroupNorm, _Candidates],
) -> None:
    with contextlib.closing(run_batches(model, batches, loss)) as runs:
        for calls in runs:
            for call in calls:
                if isinstance(call.norm, PracticalGroupNorm) and call.norm in layers:
                    layers[call.norm].add(call)
