"""Panoptic predictions as PNGs and JSON in COCO's format, and their scores in percent."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from gnpractical.datasets.panoptic import Json, id_to_rgb, panoptic_quality

logger = logging.getLogger(__name__)


def panoptic_prediction(image_id: int, ids: np.ndarray, segments: list[Json]) -> dict[str, Any]:
    """One image's prediction, small enough to be gathered from other processes.

    Args:
        ids: (H, W) segment ids, 0 where there is none.
        segments: ``id`` and the data set's ``category_id`` of each.
    """
    png = io.BytesIO()
    Image.fromarray(id_to_rgb(ids)).save(png, format="PNG")
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.png",
        "png_string": png.getvalue(),
        "segments_info": segments,
    }


def evaluate_panoptic(
    predictions: list[dict[str, Any]],
    panoptic_json: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
) -> dict[str, float]:
    """Score :func:`panoptic_prediction` s against COCO-format ground truth, and log the table.

    The predictions' JSON is kept in ``output_dir``, where one is given.

    Returns:
        ``PQ``, ``SQ``, ``RQ``, and the same with ``_th`` for things and ``_st`` for stuff, in %.
    """
    with tempfile.TemporaryDirectory(prefix="panoptic_eval") as pred_dir:
        annotations = []
        for prediction in predictions:
            entry = dict(prediction)
            (Path(pred_dir) / entry["file_name"]).write_bytes(entry.pop("png_string"))
            annotations.append(entry)
        pred_json = Path(output_dir or pred_dir) / "panoptic_predictions.json"
        pred_json.write_text(json.dumps({"annotations": annotations}))
        quality = panoptic_quality(panoptic_json, panoptic_root, pred_json, pred_dir)
    rows = [
        [name] + [100 * q[k] for k in ("pq", "sq", "rq")] + [q["n"]] for name, q in quality.items()
    ]
    logger.info(
        "Panoptic Evaluation Results:\n%s",
        tabulate(rows, ["", "PQ", "SQ", "RQ", "#categories"], tablefmt="pipe", floatfmt=".3f"),
    )
    suffixes = {"All": "", "Things": "_th", "Stuff": "_st"}
    return {
        key.upper() + suffixes[name]: 100 * q[key]
        for name, q in quality.items()
        for key in ("pq", "sq", "rq")
    }
