"""A Detectron2 model as its run left it, and its predictions."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from torch import nn

from gnpractical.d2.checkpoint import GNPCheckpointer, classes_of
from gnpractical.d2.config import load_config
from gnpractical.d2.evaluation import to_prediction
from gnpractical.d2.trainer import Trainer
from gnpractical.datasets.predictions import Prediction
from gnpractical.runs.classes import Classes, classes_in
from gnpractical.runs.saved_run import SavedRun


def load_model(run: SavedRun, device: str) -> tuple[nn.Module, Classes, CfgNode]:
    """The model in evaluation mode, its classes, and its config.

    Classes that the checkpoint does not record are those of the config's data set, or if that is
    not registered here, numbers.

    Raises:
        ValueError: The checkpoint or the config are damaged, or do not belong together.
    """
    cfg = load_config(str(run.description), ["MODEL.DEVICE", device])
    model = Trainer.build_model(cfg)
    GNPCheckpointer(model).load_all(str(run.weights), checkpointables=[])
    return model.eval(), classes_in(run.weights) or _classes(cfg), cfg


@torch.inference_mode()
def predict(model: nn.Module, classes: Classes, cfg: CfgNode, pixels: np.ndarray) -> Prediction:
    """What ``model`` predicts in an image of RGB pixels (H, W, 3) uint8."""
    height, width = pixels.shape[:2]
    image = convert_PIL_to_numpy(Image.fromarray(pixels), cfg.INPUT.FORMAT)
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
    image = resize.get_transform(image).apply_image(image)
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
    (output,) = model([{"image": tensor, "height": height, "width": width}])
    return to_prediction(output, classes)


def _classes(cfg: CfgNode) -> Classes:
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in DatasetCatalog and any((classes := classes_of(name)).values()):
            return classes
    things, stuff = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return {
        kind: {i: str(i) for i in range(n)} for kind, n in (("things", things), ("stuff", stuff))
    }
