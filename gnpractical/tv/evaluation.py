"""Box and mask AP by pycocotools, panoptic quality, and a picture of predictions."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import os
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from gnpractical.datasets.panoptic_evaluation import evaluate_panoptic, panoptic_prediction
from gnpractical.datasets.pictures import PictureGrid, draw_boxes, draw_segments
from gnpractical.tv.datasets import CocoImages
from gnpractical.tv.distributed import all_gather, rank, world_size

logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: CocoImages, output_dir: str, device: torch.device, workers: int = 0
) -> dict[str, float]:
    """Predict the validation split ``dataset``, every process its share, and score on rank 0.

    Leaves the predictions in COCO's formats and ``predictions.png`` in ``output_dir``.

    Returns:
        On rank 0 ``bbox/AP``, ``AP50``, ``AP75``, and for the panoptic model ``segm/...`` and
        ``panoptic_seg/PQ``, ``SQ``, ``RQ`` (also ``_th``, ``_st``), in %; nan where there is
        nothing to find. On the others {}.
    """
    model.eval()
    os.makedirs(output_dir, exist_ok=True)
    instances: list[dict] = []
    panoptic: list[dict] = []
    grid = PictureGrid()
    # Not a DistributedSampler, which repeats images to give every process as many.
    share = Subset(dataset, range(rank(), len(dataset), world_size()))
    loader = DataLoader(share, None, num_workers=workers)
    for image, target in tqdm(loader, desc="evaluation", leave=False, disable=None):
        (result,) = model([image.to(device)])
        result = _with_category_ids(result, dataset)
        instances += _instances(result, target["image_id"])
        if dataset.panoptic:
            ids, segments = result["panoptic_ids"].numpy(), result["segments"]
            panoptic.append(panoptic_prediction(target["image_id"], ids, segments))
        if rank() == 0 and not grid.full:
            picture = (255 * image).round().byte().permute(1, 2, 0).numpy()
            grid.add(picture, _draw(picture, result, dataset.things | dataset.stuff))
    instances = list(itertools.chain(*all_gather(instances)))
    panoptic = list(itertools.chain(*all_gather(panoptic)))
    if rank():
        return {}
    grid.save(os.path.join(output_dir, "predictions.png"))
    with open(os.path.join(output_dir, "coco_instances_results.json"), "w") as f:
        json.dump(instances, f)
    scores = _average_precision(dataset, instances, "bbox")
    if dataset.panoptic:
        scores |= _average_precision(dataset, instances, "segm")
        quality = evaluate_panoptic(
            panoptic, dataset.files["panoptic_json"], dataset.files["panoptic_root"], output_dir
        )
        scores |= {f"panoptic_seg/{key}": value for key, value in quality.items()}
    return scores


def _with_category_ids(result: dict[str, Any], dataset: CocoImages) -> dict[str, Any]:
    """A model's result on the CPU, with the data set's category ids in place of its labels."""
    things, stuff = list(dataset.things), list(dataset.stuff)
    if "masks" in result:
        result["masks"] = result["masks"][:, 0] > 0.5  # a quarter of the bytes to move
    result = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()}
    result["category_ids"] = [things[label - 1] for label in result.pop("labels").tolist()]
    result["segments"] = [
        {"id": s["id"], "category_id": (things if s["isthing"] else stuff)[s["label"] - 1]}
        for s in result.get("segments", [])
    ]
    return result


def _instances(result: dict[str, Any], image_id: int) -> list[dict]:
    """The instances in COCO's format of results."""
    entries = []
    for i, (x0, y0, x1, y1) in enumerate(result["boxes"].tolist()):
        entry = {
            "image_id": image_id,
            "category_id": result["category_ids"][i],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(result["scores"][i]),
        }
        if "masks" in result:
            mask = result["masks"][i].numpy().astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(mask))
            entry["segmentation"] = rle | {"counts": rle["counts"].decode("ascii")}
        entries.append(entry)
    return entries


def _average_precision(dataset: CocoImages, results: list[dict], kind: str) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 in %; the whole table is logged."""
    if kind == "segm":  # else areas would be taken from the boxes
        results = [{k: v for k, v in entry.items() if k != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predictions = dataset.coco.loadRes(results) if results else COCO()  # loadRes needs some
        evaluation = COCOeval(dataset.coco, predictions, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = [line for line in printed.getvalue().splitlines() if " = " in line]
    logger.info("%s of %d predictions:\n%s", kind, len(results), "\n".join(table))
    # COCO's -1: there is nothing to find.
    values = [100 * v if v >= 0 else math.nan for v in evaluation.stats[:3].tolist()]
    return dict(zip((f"{kind}/AP", f"{kind}/AP50", f"{kind}/AP75"), values, strict=True))


def _draw(image: np.ndarray, result: dict[str, Any], names: dict[int, str]) -> np.ndarray:
    if result["segments"]:
        rows = [(s["id"], s["category_id"], names[s["category_id"]]) for s in result["segments"]]
        return draw_segments(image, result["panoptic_ids"].numpy(), rows)
    boxes, scores = result["boxes"].tolist(), result["scores"].tolist()
    return draw_boxes(image, boxes, result["category_ids"], scores, names)
