"""Faster R-CNN and Panoptic FPN on torchvision, with a norm in every part chosen by its name."""

from gnpractical.tv.builders import fasterrcnn_resnet_fpn, panoptic_fpn_resnet
from gnpractical.tv.panoptic_fpn import PanopticFPN

__all__ = ["PanopticFPN", "fasterrcnn_resnet_fpn", "panoptic_fpn_resnet"]
