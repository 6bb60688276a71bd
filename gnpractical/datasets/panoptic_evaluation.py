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
        image_id: The image's id in the data set.
        ids: (H, W), the id of each pixel's segment, 0 where there is none.
        segments: A dict with ``id`` and the data set's ``category_id`` for each segment.
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
    output_dir: str | os.PathLike,
) -> dict[str, float]:
    """Score :func:`panoptic_prediction` s against COCO-format ground truth, and log the table.

    The predictions' JSON is kept in ``output_dir``.

    Returns:
        ``PQ``, ``SQ``, ``RQ``, and the same with ``_th`` for things and ``_st`` for stuff, in %.
    """
    with tempfile.TemporaryDirectory(prefix="panoptic_eval") as pred_dir:
        for p in predictions:
            Path(pred_dir, p["file_name"]).write_bytes(p["png_string"])
        annotations = [{k: v for k, v in p.items() if k != "png_string"} for p in predictions]
        pred_json = Path(output_dir, "panoptic_predictions.json")
        pred_json.write_text(json.dumps({"annotations": annotations}))
        quality = panoptic_quality(panoptic_json, panoptic_root, pred_json, pred_dir)
    scores: dict[str, float] = {}
    rows = []
    for name, suffix in ("All", ""), ("Things", "_th"), ("Stuff", "_st"):
        pq, sq, rq = (100 * quality[name][key] for key in ("pq", "sq", "rq"))
        rows.append([name, pq, sq, rq, quality[name]["n"]])
        scores |= {f"PQ{suffix}": pq, f"SQ{suffix}": sq, f"RQ{suffix}": rq}
    table = tabulate(rows, ["", "PQ", "SQ", "RQ", "#categories"], tablefmt="pipe", floatfmt=".3f")
    logger.info("Panoptic Evaluation Results:\n%s", table)
    return scores
