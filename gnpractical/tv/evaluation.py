"""Box and mask AP by pycocotools, panoptic quality, and a picture of predictions."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from gnpractical.datasets.panoptic_evaluation import evaluate_panoptic, panoptic_prediction
from gnpractical.datasets.pictures import PictureGrid, draw_boxes, draw_segments
from gnpractical.tv.datasets import CocoImages
from gnpractical.tv.distributed import gather, rank, world_size

logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: CocoImages, output_dir: str, device: torch.device, workers: int = 0
) -> dict[str, float]:
    """Predict ``dataset``, every process its share, and score on rank 0 ({} on the others).

    Leaves the predictions in COCO's formats and ``predictions.png`` in ``output_dir``.

    Args:
        dataset: a validation split.
        workers: loader processes.

    Returns:
        ``bbox/AP``, ``AP50``, ``AP75``, and for the panoptic model ``segm/...`` and
        ``panoptic_seg/PQ``, ``SQ``, ``RQ`` (also ``_th``, ``_st``), in %; nan where there is
        nothing to find.
    """
    model.eval()
    os.makedirs(output_dir, exist_ok=True)
    boxes: list[dict] = []
    panoptic: list[dict] = []
    grid = PictureGrid()
    # Not a DistributedSampler, which repeats images to give every process as many.
    indices = range(rank(), len(dataset), world_size())
    loader = DataLoader(Subset(dataset, indices), None, num_workers=workers)
    for index, (image, target) in zip(
        indices, tqdm(loader, desc="evaluation", leave=False, disable=None), strict=True
    ):
        (result,) = model([image.to(device)])
        if "masks" in result:
            result["masks"] = result["masks"][:, 0] > 0.5  # a quarter of the bytes to move
        result = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()}
        boxes += _instances(result, target["image_id"], dataset)
        if dataset.panoptic:
            panoptic.append(_panoptic(result, target["image_id"], dataset))
        if rank() == 0 and not grid.full:
            picture = np.asarray(dataset.read_image(index))
            grid.add(picture, _draw(picture, result, dataset))
    boxes, panoptic = gather(boxes), gather(panoptic)
    if rank():
        return {}
    grid.save(os.path.join(output_dir, "predictions.png"))
    with open(os.path.join(output_dir, "coco_instances_results.json"), "w") as f:
        json.dump(boxes, f)
    scores = _average_precision(dataset, boxes, "bbox")
    if dataset.panoptic:
        scores |= _average_precision(dataset, boxes, "segm")
        quality = evaluate_panoptic(
            panoptic, dataset.files["panoptic_json"], dataset.files["panoptic_root"], output_dir
        )
        scores |= {f"panoptic_seg/{key}": value for key, value in quality.items()}
    return scores


def _instances(result: dict[str, Any], image_id: int, dataset: CocoImages) -> list[dict]:
    entries, category_ids = [], list(dataset.things)
    for i, (x0, y0, x1, y1) in enumerate(result["boxes"].tolist()):
        entry = {
            "image_id": image_id,
            "category_id": category_ids[int(result["labels"][i]) - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(result["scores"][i]),
        }
        if dataset.panoptic:
            mask = result["masks"][i].numpy().astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(mask))
            entry["segmentation"] = rle | {"counts": rle["counts"].decode("ascii")}
        entries.append(entry)
    return entries


def _panoptic(result: dict[str, Any], image_id: int, dataset: CocoImages) -> dict[str, Any]:
    things, stuff = list(dataset.things), list(dataset.stuff)
    segments = [
        {"id": s["id"], "category_id": (things if s["isthing"] else stuff)[s["label"] - 1]}
        for s in result["segments"]
    ]
    return panoptic_prediction(image_id, result["panoptic_ids"].numpy(), segments)


def _average_precision(dataset: CocoImages, results: list[dict], kind: str) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 in %; the whole table is logged."""
    assert dataset.coco is not None
    keys = [f"{kind}/{name}" for name in ("AP", "AP50", "AP75")]
    if not results:
        logger.warning("No %s predictions", kind)
        some = any(not a["iscrowd"] for a in dataset.coco.anns.values())
        return dict.fromkeys(keys, 0.0 if some else math.nan)
    if kind == "segm":  # else areas would be taken from the boxes
        results = [{k: v for k, v in entry.items() if k != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(copy.deepcopy(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = [line for line in printed.getvalue().splitlines() if " = " in line]
    logger.info("%s:\n%s", kind, "\n".join(table))
    # COCO's -1: there is nothing to find.
    values = [100 * v if v >= 0 else math.nan for v in evaluation.stats[:3].tolist()]
    return dict(zip(keys, values, strict=True))


def _draw(image: np.ndarray, result: dict[str, Any], dataset: CocoImages) -> np.ndarray:
    things, stuff = list(dataset.things.values()), list(dataset.stuff.values())
    if dataset.panoptic:
        rows = [
            (s["id"], s["label"] - 1, things[s["label"] - 1])
            if s["isthing"]
            else (s["id"], len(things) + s["label"], stuff[s["label"] - 1])
            for s in result["segments"]
        ]
        return draw_segments(image, result["panoptic_ids"].numpy(), rows)
    classes = [label - 1 for label in result["labels"].tolist()]
    return draw_boxes(image, result["boxes"].tolist(), classes, result["scores"].tolist(), things)
