"""What a model predicts in an image, by a data set's category ids: in COCO's form, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from gnpractical.datasets.panoptic import Json
from gnpractical.datasets.pictures import draw_boxes, draw_segments

Names = Mapping[str, Mapping[Any, str]]  # of "things" and "stuff", by category id


@dataclass(frozen=True)
class Prediction:
    """What a model predicts in one image.

    Attributes:
        instances: As COCO's results, but for the image's id.
        ids: (H, W) int, the id of each pixel's segment, 0 for none; None without segments.
        segments: A dict of ``id``, ``category_id`` and ``isthing`` for each.
    """

    instances: list[Json]
    ids: np.ndarray | None = None
    segments: list[Json] = field(default_factory=list)


def coco_instances(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    category_ids: Sequence[Any],
    masks: np.ndarray | None = None,
) -> list[Json]:
    """Instances in COCO's format of results.

    Args:
        boxes: x0, y0, x1, y1 of each, in pixels.
        masks: (N, H, W) bool, if the model predicts them.
    """
    entries: list[Json] = [
        {"category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score, category_id in zip(boxes, scores, category_ids, strict=True)
    ]
    for entry, mask in zip(entries, () if masks is None else masks, strict=masks is not None):
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        entry["segmentation"] = rle | {"counts": rle["counts"].decode("ascii")}
    return entries


def draw(
    image: np.ndarray, prediction: Prediction, names: Names, min_score: float = 0.5
) -> np.ndarray:
    """``image`` (H, W, 3) uint8 with the segments, or where there are none with the instances.

    Args:
        min_score: What instances must score.
    """
    if prediction.ids is not None:
        segments = [
            (s["id"], s["category_id"], _name(names, s["category_id"], s["isthing"]))
            for s in prediction.segments
        ]
        return draw_segments(image, prediction.ids, segments)
    found = [i for i in prediction.instances if i["score"] >= min_score]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (i["bbox"] for i in found)]
    numbers = [i["category_id"] for i in found]
    labels = [f"{_name(names, i['category_id'], True)} {i['score']:.2f}" for i in found]
    masks = [coco_mask.decode(i["segmentation"]) for i in found if "segmentation" in i]
    return draw_boxes(image, boxes, numbers, labels, masks)


def _name(names: Names, category_id: Any, isthing: bool) -> str:
    return names.get("things" if isthing else "stuff", {}).get(category_id, str(category_id))
