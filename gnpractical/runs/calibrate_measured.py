"""Calibration before the first step of a training run, with the same choice in every process."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from tabulate import tabulate
from torch import nn

from gnpractical.layers.unchanged import Run
from gnpractical.measure.calibration import calibrate, measured_norms

logger = logging.getLogger(__name__)


def calibrate_measured(model: nn.Module, batches: list[Any], run: Run | None = None) -> None:
    """Choose the counts of ``model``'s GN_MEASURED norms that no checkpoint has brought.

    Every process runs, on its own batches, since layers may synchronize; all take rank 0's
    choice. Where a norm has a count, nothing is done.

    Args:
        model, batches, run: as of ``calibrate``; the model itself, not wrapped for DDP.
    """
    norms = {n: norm for n, norm in measured_norms(model).items() if norm.num_groups is None}
    if not norms:
        return
    logger.info("Calibrating %d GN_MEASURED norms on %d batches", len(norms), len(batches))
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rows = calibrate(model, batches, run, only=norms, until_stable=not distributed)
    if distributed:
        dist.broadcast_object_list(rows)
    for row in rows:
        norms[row.name].set_num_groups(row.num_groups)
    table = []
    for row in rows:
        values = row.ratios.values()
        extremes = min(values, default=None), max(values, default=None)
        table.append([row.name, row.num_groups, row.ratios.get(row.num_groups), *extremes])
    headers = ["layer", "G", "K(G)", "lowest K", "highest K"]
    text = tabulate(table, headers, floatfmt=".2f", missingval="-", disable_numparse=[0])
    logger.info("K, variance of the gradient across each block by the law:\n%s", text)
