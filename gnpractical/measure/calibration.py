"""Group counts chosen by the law: for each norm the divisor whose K is closest to 1 in log.

The law takes what it needs from forward passes (see ``features``), without a loss. A choice changes
what later layers see; the pass is therefore repeated with the new counts, until none changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gnpractical.layers.group_norm import MEASURED, MIN_VALUES, PracticalGroupNorm
from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.unchanged import Run
from gnpractical.measure.features import BlockFeatures, feature_statistics
from gnpractical.num_groups import check_width, divisors, practical_num_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredGroups:
    """What calibration chose for one norm.

    Attributes:
        name: path of the norm.
        num_groups: the choice.
        ratios: K of every candidate by the law, by number of groups, from the last pass; empty
            where the norm did not run or its layer's weights are unknown, and then the choice is
            Algorithm 1's.
    """

    name: str
    num_groups: int
    ratios: dict[int, float]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run | None = None,
    *,
    only: Collection[str] | None = None,
    max_passes: int = 4,
    until_stable: bool = True,
) -> list[MeasuredGroups]:
    """Choose the group count of every norm of ``model`` whose rule is ``"measured"``, in place.

    Args:
        model: any model; it runs in training mode and without gradients.
        batches: a few batches as in training; each is used in every pass.
        run: ``run(model, batch)`` runs the model. By default ``model(batch)``.
        only: paths of the norms to choose for; None is all.
        max_passes: how often at most all batches are run.
        until_stable: stop when no count changes. Without it every process of a distributed model
            runs equally many passes, as layers that synchronize require.

    Returns:
        One row for every measured norm, in registration order.

    Raises:
        TypeError, ValueError: no such norm; one without a known weight layer; and as
            ``feature_statistics``. After any error the model is as it was.
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
    rows: list[MeasuredGroups] = []
    try:
        for norm in norms.values():
            if norm.in_channels is None:
                raise ValueError(
                    f"a norm of {norm.num_channels} channels has the rule 'measured' but no known "
                    f"weight layer: call resolve(in_channels=...) on it."
                )
            norm.num_groups = 1  # the one count that runs on every input
        for _ in range(max_passes):
            seen = {block.name: block for block in feature_statistics(model, batches, run)}
            if all(block.mean_share is None for block in seen.values()):
                raise ValueError("no norm ran: run must call the model with the batch")
            rows = [_choose(name, norm, seen[name]) for name, norm in norms.items()]
            changed = [row for row in rows if norms[row.name].num_groups != row.num_groups]
            for row in rows:
                norms[row.name].num_groups = row.num_groups
            if until_stable and not changed:
                break
    except BaseException:
        for norm, before_it in before.items():
            norm.num_groups = before_it
        raise
    unmeasured = [row.name for row in rows if not row.ratios]
    if unmeasured:
        logger.warning(
            "%d norms could not be measured (they did not run, or get no weight layer's output) "
            "and have GN_PRACTICAL's number of groups: %s",
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


def _choose(name: str, norm: PracticalGroupNorm, block: BlockFeatures) -> MeasuredGroups:
    """The count whose K is closest to 1; Algorithm 1's where none is known."""
    ratios = {}
    for count in divisors(norm.num_channels):
        values = norm.num_channels // count * (block.fewest_positions or 1)
        ratio = block.gradient_variance_ratio(count)
        # Fewer values leave no gradient, or one whose variance is infinite.
        if ratio and math.isfinite(ratio) and (count == 1 or values >= MIN_VALUES):
            ratios[count] = ratio
    if not ratios:
        assert norm.in_channels is not None
        return MeasuredGroups(name, practical_num_groups(norm.in_channels, norm.num_channels), {})
    # The larger on a tie, as in the other rules.
    best = min(ratios, key=lambda count: (abs(math.log(ratios[count])), -count))
    return MeasuredGroups(name, best, ratios)
