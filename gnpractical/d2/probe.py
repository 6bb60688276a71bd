"""Measuring the gradient's variance during Detectron2's training."""

from __future__ import annotations

from typing import Any

from detectron2.engine.train_loop import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from gnpractical.analysis.gradient_isometry import mean_abs_log, measure_gradient_variance


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
