"""Measuring the gradient's variance in Detectron2's training: GN_MEASURED and the probe."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from gnpractical.analysis.calibration import MeasuredGroups, calibrate, measured_norms
from gnpractical.analysis.gradient_isometry import mean_abs_log, measure_gradient_variance

logger = logging.getLogger(__name__)


def calibrate_measured(model: nn.Module, batches: list[Any]) -> None:
    """Choose the counts of ``model``'s GN_MEASURED norms that no checkpoint has brought.

    Every process measures, on its own batches, since layers may synchronize; all take rank 0's
    choice. Where a norm has a count, nothing is done.
    """
    norms = {n: norm for n, norm in measured_norms(model).items() if norm.num_groups is None}
    if not norms:
        return
    logger.info("Calibrating %d GN_MEASURED norms on %d batches", len(norms), len(batches))
    # The model's own scalars are not training's.
    with EventStorage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logged below
        rows = calibrate(model, batches, only=norms, until_stable=comm.get_world_size() == 1)
    rows = comm.all_gather(rows)[0]
    for row in rows:
        norms[row.name].set_num_groups(row.num_groups)
    logger.info("K, measured variance of the gradient across each block:\n%s", _table(rows))
    unmeasured = [row.name for row in rows if not row.ratios]
    if unmeasured:
        logger.warning(
            "%d norms could not be measured (no finite, nonzero gradient in these batches) and "
            "have GN_PRACTICAL's count: %s", len(unmeasured), ", ".join(unmeasured[:5])
        )  # fmt: skip


class GradientProbe(HookBase):
    """Writes K of every unit block each ``period`` iterations, to TensorBoard and metrics.json.

    Always on the same batches, so that what changes is the model: scalars
    ``gradient_variance_ratio/<norm>``, and ``.../mean_abs_log``, 0 for an isometric model. Each
    time costs about one step; training goes on as it would have without.
    """

    def __init__(self, model: nn.Module, batches: list[Any], period: int) -> None:
        self._model, self._batches, self._period = model, batches, period

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period:
            return
        with EventStorage():
            rows = measure_gradient_variance(self._model, self._batches)
        ratios = {row.name: row.ratio for row in rows if row.ratio}
        for name, ratio in ratios.items():
            self.trainer.storage.put_scalar(
                f"gradient_variance_ratio/{name}", ratio, smoothing_hint=False
            )
        if ratios:
            self.trainer.storage.put_scalar(
                "gradient_variance_ratio/mean_abs_log", mean_abs_log(rows), smoothing_hint=False
            )


def _table(rows: list[MeasuredGroups]) -> str:
    return tabulate(
        [
            [row.name, row.num_groups, row.ratios.get(row.num_groups), *_range(row)]
            for row in rows
        ],
        ["layer", "G", "K(G)", "lowest K", "highest K"],
        floatfmt=".2f",
        missingval="-",
        disable_numparse=[0],
    )


def _range(row: MeasuredGroups) -> tuple[float, float] | tuple[None, None]:
    return (min(row.ratios.values()), max(row.ratios.values())) if row.ratios else (None, None)
