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

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from gnpractical.datasets.panoptic_evaluation import evaluate_panoptic, panoptic_prediction
from gnpractical.datasets.pictures import PictureGrid
from gnpractical.datasets.predictions import Prediction, coco_instances, draw
from gnpractical.runs.classes import Classes
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
        prediction, image_id = to_prediction(result, dataset.classes), target["image_id"]
        instances += [{"image_id": image_id} | entry for entry in prediction.instances]
        if prediction.ids is not None:
            panoptic.append(panoptic_prediction(image_id, prediction.ids, prediction.segments))
        if rank() == 0 and not grid.full:
            picture = (255 * image).round().byte().permute(1, 2, 0).numpy()
            grid.add(picture, draw(picture, prediction, dataset.classes))
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


def to_prediction(result: dict[str, Any], classes: Classes) -> Prediction:
    """One image's result of a model, by the category ids of the data set that has ``classes``."""
    things, stuff = list(classes["things"]), list(classes["stuff"])
    masks = result.get("masks")
    if masks is not None:
        masks = (masks[:, 0] > 0.5).cpu().numpy()  # a quarter of the bytes to move
    category_ids = [things[label - 1] for label in result["labels"].tolist()]
    instances = coco_instances(
        result["boxes"].tolist(), result["scores"].tolist(), category_ids, masks
    )
    if "segments" not in result:
        return Prediction(instances)
    segments = [
        {
            "id": s["id"],
            "category_id": (things if s["isthing"] else stuff)[s["label"] - 1],
            "isthing": s["isthing"],
        }
        for s in result["segments"]
    ]
    return Prediction(instances, result["panoptic_ids"].cpu().numpy(), segments)


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
