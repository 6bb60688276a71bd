"""A model of ``tools/train_torchvision.py`` as its run left it, and its predictions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gnpractical.datasets.panoptic import read_json
from gnpractical.datasets.predictions import Prediction
from gnpractical.runs.classes import Classes, classes_in
from gnpractical.runs.export import Detector
from gnpractical.runs.saved_run import SavedRun
from gnpractical.tv.checkpoint import TorchvisionCheckpointer, require_measured
from gnpractical.tv.evaluation import to_prediction
from gnpractical.tv.panoptic_fpn import PanopticFPN
from gnpractical.tv.run import RunOptions, build, check_numbers


def load_model(run: SavedRun, device: str) -> tuple[nn.Module, Classes]:
    """The model in evaluation mode, and its classes.

    Raises:
        ValueError: The checkpoint or the options are damaged, or do not belong together.
    """
    classes = classes_in(run.weights)
    if not classes:
        raise ValueError(f"{run.weights} does not record the classes of its model")
    try:
        options = RunOptions(**read_json(run.description))
        check_numbers(options)
        model = build(options, len(classes["things"]), len(classes["stuff"])).to(device)
    except (IndexError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{run.description} are not this script's options: {e}") from e
    checkpointer = TorchvisionCheckpointer(model)
    checkpointer.load_anyway = ""  # it is the training's option
    checkpointer.load_all(str(run.weights), checkpointables=[])
    require_measured(model, str(run.weights))
    return model.eval(), classes


@torch.inference_mode()
def predict(model: nn.Module, classes: Classes, pixels: np.ndarray) -> Prediction:
    """What ``model`` predicts in an image of RGB pixels (H, W, 3) uint8."""
    device = next(model.parameters()).device
    image = torch.from_numpy(pixels).to(device).permute(2, 0, 1).float() / 255
    return to_prediction(model([image])[0], classes)


def detector(model: nn.Module) -> Detector:
    """The whole model for export, which takes RGB images of any size with values in 0..1.

    Of Panoptic FPN it gives the instances and the semantic labels, not yet merged.
    """
    names = ["boxes", "labels", "scores"]
    if isinstance(model, PanopticFPN):
        model.merges = False
        names += ["masks", "semantic"]
    return Detector(_FirstResult(model, names).eval(), names, 1.0)


class _FirstResult(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        result = self.model([image])[0]
        return tuple(result[name] for name in self.names)
