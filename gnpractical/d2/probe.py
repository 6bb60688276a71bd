"""Measuring the gradient's variance during Detectron2's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from gnpractical.measure.gradient_isometry import mean_abs_log, measure_gradient_variance


class GradientProbe(HookBase):
    """Writes K of every unit block each ``period`` iterations, to TensorBoard and metrics.json.

    Always on the same batches, so that what changes is the model: scalars
    ``gradient_variance_ratio/<norm>``, and ``.../mean_abs_log``, 0 for an isometric model. Each
    time costs about one step; training goes on as it would have without.

    Args:
        model: The model that is trained, not wrapped for DDP.
        load_batches: Called once, before training.
        period: In iterations.
    """

    def __init__(
        self, model: nn.Module, load_batches: Callable[[], list[Any]], period: int
    ) -> None:
        self._model, self._load_batches, self._period = model, load_batches, period

    def before_train(self) -> None:
        self._batches = self._load_batches()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period:
            return
        with EventStorage():
            rows = measure_gradient_variance(self._model, self._batches)
        ratios = {row.name: row.ratio for row in rows if row.ratio}
        if ratios:
            ratios["mean_abs_log"] = mean_abs_log(rows)
        for name, ratio in ratios.items():
            self.trainer.storage.put_scalar(
                f"gradient_variance_ratio/{name}", ratio, smoothing_hint=False
            )
