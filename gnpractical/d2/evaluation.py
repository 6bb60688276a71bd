"""Evaluators: the right ones for a data set, panoptic quality, and a picture of predictions."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm

from gnpractical.d2.checkpoint import classes_of
from gnpractical.datasets.panoptic import Json
from gnpractical.datasets.panoptic_evaluation import evaluate_panoptic, panoptic_prediction
from gnpractical.datasets.pictures import PictureGrid
from gnpractical.datasets.predictions import Prediction, coco_instances, draw
from gnpractical.runs.classes import Classes

_EVALUATORS = {
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
}


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None):
    """The evaluators for what ``cfg``'s model predicts on ``dataset_name``.

    Chosen by the data set's ``evaluator_type``, as in Detectron2's own training script; on
    panoptic data a model without a semantic branch is evaluated on boxes and masks alone.

    Raises:
        ValueError: the data set's metadata name no evaluator this function knows.
    """
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in _EVALUATORS:
        return _EVALUATORS[kind](dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    evaluators: list[DatasetEvaluator] = []
    panoptic = kind == "coco_panoptic_seg" and "Panoptic" in cfg.MODEL.META_ARCHITECTURE
    if kind == "sem_seg" or panoptic:
        evaluators.append(SemSegEvaluator(dataset_name, output_dir=output_dir))
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(COCOEvaluator(dataset_name, output_dir=output_dir))
    if panoptic:
        evaluators.append(PanopticEvaluator(dataset_name, output_dir))
    if not evaluators:
        raise ValueError(
            f"Data set {dataset_name!r} has the evaluator_type {kind!r}, for which there is no "
            f"evaluator here; set MetadataCatalog.get({dataset_name!r}).evaluator_type."
        )
    evaluators.append(PredictionGrid(dataset_name, os.path.join(output_dir, "predictions.png")))
    return DatasetEvaluators(evaluators)


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality of what Detectron2's panoptic models predict, without ``panopticapi``."""

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        os.makedirs(output_dir, exist_ok=True)
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for input, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            ids = ids.cpu().numpy().astype(np.int64)
            if segments is None:  # ids are category * label_divisor + instance, -1 is void
                segments = self._segments_of_labels(ids)
                ids = ids + 1
            segments = [{"id": s["id"], "category_id": self._dataset_id(s)} for s in segments]
            self._predictions.append(panoptic_prediction(input["image_id"], ids, segments))

    def _segments_of_labels(self, labels: np.ndarray) -> list[dict[str, Any]]:
        things = self._metadata.thing_dataset_id_to_contiguous_id.values()
        divisor = self._metadata.label_divisor
        return [
            {
                "id": int(label) + 1,
                "category_id": int(label) // divisor,
                "isthing": int(label) // divisor in things,
            }
            for label in np.unique(labels)
            if label >= 0
        ]

    def _dataset_id(self, segment: dict[str, Any]) -> int:
        """The category id of a segment in the data set; the model counts from 0."""
        if "isthing" not in segment:  # the model gives the data set's ids itself
            return segment["category_id"]
        kind = "thing" if segment["isthing"] else "stuff"
        contiguous = self._metadata.get(f"{kind}_dataset_id_to_contiguous_id")
        return {number: id for id, number in contiguous.items()}[segment["category_id"]]

    def evaluate(self) -> OrderedDict | None:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(self._predictions)))
        if not comm.is_main_process():
            return None
        metadata = self._metadata
        scores = evaluate_panoptic(
            predictions, metadata.panoptic_json, metadata.panoptic_root, self._output_dir
        )
        return OrderedDict(panoptic_seg=scores)


class PredictionGrid(DatasetEvaluator):
    """Draws the first images of a data set, each beside what the model predicts, into one PNG."""

    def __init__(self, dataset_name: str, path: str, num_images: int = 12) -> None:
        self._dataset = dataset_name
        self._path, self._num_images = path, num_images
        self.reset()

    def reset(self) -> None:
        self._grid = PictureGrid(self._num_images)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for input, output in zip(inputs, outputs, strict=True):
            if comm.is_main_process() and not self._grid.full:
                image = read_image(input["file_name"], "RGB")
                # By now the data set is loaded, and its metadata complete.
                classes = classes_of(self._dataset)
                prediction = to_prediction(output, classes)
                self._grid.add(image, draw(image, prediction, classes))

    def evaluate(self) -> None:
        self._grid.save(self._path)


def to_prediction(output: dict[str, Any], classes: Classes) -> Prediction:
    """One image's output of a model, by the category ids of the data set that has ``classes``."""
    things, stuff = list(classes["things"]), list(classes["stuff"])
    instances: list[Json] = []
    if "instances" in output:
        found = output["instances"].to("cpu")
        numbers = found.pred_classes.tolist()
        masks = found.pred_masks.numpy() if found.has("pred_masks") else None
        boxes, scores = found.pred_boxes.tensor.tolist(), found.scores.tolist()
        instances = coco_instances(boxes, scores, [things[n] for n in numbers], masks)
    if "panoptic_seg" in output and output["panoptic_seg"][1] is not None:
        ids, segments = output["panoptic_seg"]
        rows = [
            s | {"category_id": (things if s["isthing"] else stuff)[s["category_id"]]}
            for s in segments
        ]
        return Prediction(instances, ids.cpu().numpy(), rows)
    if "sem_seg" in output and "instances" not in output:
        labels = output["sem_seg"].argmax(dim=0).cpu().numpy()
        found = [(int(n), stuff[n]) for n in np.unique(labels)]
        rows = [{"id": n + 1, "category_id": id, "isthing": False} for n, id in found]
        return Prediction([], labels + 1, rows)
    return Prediction(instances)
