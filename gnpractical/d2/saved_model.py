"""A Detectron2 model as its run left it, and its predictions."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from PIL import Image
from torch import nn

from gnpractical.d2.checkpoint import GNPCheckpointer, classes_of
from gnpractical.d2.config import load_config
from gnpractical.d2.evaluation import to_prediction
from gnpractical.d2.trainer import Trainer
from gnpractical.datasets.predictions import Prediction
from gnpractical.runs.classes import Classes, classes_in
from gnpractical.runs.export import Detector
from gnpractical.runs.saved_run import SavedRun


def load_model(run: SavedRun, device: str) -> tuple[nn.Module, Classes, CfgNode]:
    """The model in evaluation mode, its classes, and its config.

    Classes that the checkpoint does not record are those of the config's data set, or if that is
    not registered here, numbers.

    Raises:
        ValueError: The checkpoint or the config are damaged, or do not belong together.
    """
    if "_target_:" in run.description.read_text(errors="replace"):
        raise ValueError(
            f"{run.description} is a LazyConfig, whose runs cannot be read, YAML's can"
        )
    cfg = load_config(str(run.description), ["MODEL.DEVICE", device])
    model = Trainer.build_model(cfg)
    checkpointer = GNPCheckpointer(model)
    checkpointer.load_anyway = ""  # it is the training's key
    checkpointer.load_all(str(run.weights), checkpointables=[])
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


def detector(model: nn.Module) -> Detector:
    """The whole model for export, by Detectron2's ``TracingAdapter``.

    It takes images in INPUT.FORMAT with values in 0..255, resized already, and gives boxes, labels
    and scores in them, and if the model has masks, those of 28x28 pixels in their boxes.

    Raises:
        ValueError: The model is no ``GeneralizedRCNN``.
    """
    if type(model) is not GeneralizedRCNN:
        raise ValueError(
            f"--part model: of Detectron2's models only GeneralizedRCNN can be written whole, not "
            f"{type(model).__name__}. Take --part backbone"
        )

    def instances(model: GeneralizedRCNN, inputs: list[dict]) -> list[dict]:
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    adapter = TracingAdapter(model, [{"image": torch.zeros(3, 64, 64)}], instances)
    masks = ["masks"] if model.roi_heads.mask_on else []
    return Detector(adapter.eval(), ["boxes", "labels", *masks, "scores", "size"], 255.0)


def _classes(cfg: CfgNode) -> Classes:
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in DatasetCatalog and any((classes := classes_of(name)).values()):
            return classes
    things, stuff = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return {
        kind: {i: str(i) for i in range(n)} for kind, n in (("things", things), ("stuff", stuff))
    }
