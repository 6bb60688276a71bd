"""Builders in the manner of ``torchvision.models.detection``: keyword arguments only.

Backbone, FPN and heads are torchvision's. What the norm names mean is what they mean in
Detectron2's configs, and every layer gets the number of groups that it has there.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from gnpractical.datasets.panoptic import IGNORE_LABEL
from gnpractical.layers.group_norm import group_norm_from_name, unknown_norm_message
from gnpractical.layers.weight_standardization import apply_weight_standardization
from gnpractical.num_groups import check_width
from gnpractical.tv.checkpoint import DEPTHS, TorchvisionCheckpointer
from gnpractical.tv.panoptic_fpn import PanopticFPN, SemanticBranch

NormLayer = Callable[[int], nn.Module]

LEVELS = ["0", "1", "2", "3"]  # of the FPN, one for each stage of the ResNet; "pool" follows
_OTHER_NORMS: dict[str, NormLayer] = {
    "GN": partial(nn.GroupNorm, 32),
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}


def norm_layer(norm: str) -> NormLayer:
    """What torchvision calls a ``norm_layer``: a function of the number of channels.

    Raises:
        ValueError: The name is unknown. The message lists the valid ones.
    """
    if isinstance(norm, str) and norm in _OTHER_NORMS:
        return _OTHER_NORMS[norm]
    if not isinstance(norm, str) or group_norm_from_name(norm, 1) is None:
        raise ValueError(unknown_norm_message(norm, list(_OTHER_NORMS)))
    return partial(group_norm_from_name, norm)  # type: ignore[return-value]


def fasterrcnn_resnet_fpn(
    *,
    depth: int = 50,
    norm: str = "GN_PRACTICAL",
    weight_standardization: bool = False,
    stride_in_1x1: bool = False,
    weights_backbone: str = "",
    num_classes: int = 91,
    stages: int = 4,
    channels: int = 256,
    box_convs: int = 4,
    fc_channels: int = 1024,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN with a ResNet-FPN backbone and the 4conv1fc box head.

    Args:
        depth: That of the ResNet: 18, 34, 50 or 101.
        norm: The norm of all parts: "GN_PRACTICAL", "GN_CLOSEST", "GN_EXACT", "GN_MEASURED",
            "GN_<k>", "GN_UPTO_<k>", "GN_CPG_<n>", "GN" (32 groups), "BN", "SyncBN" or "FrozenBN".
        weight_standardization: Standardize the convolutions of backbone, FPN and box head.
        stride_in_1x1: Let bottlenecks stride in their first convolution, as MSRA's weights do.
        weights_backbone: A file to take the ResNet's weights from (see ``runs.pretrained``); "":
            random ones. If its norms are others, a warning says so: see ``match_norms``.
        num_classes: The number of classes and 1 for the background, as torchvision counts.
        stages: How many of the ResNet's four stages there are.
        channels: The width of the FPN and of the heads' convolutions.
        box_convs: The number of convolutions in the box head.
        fc_channels: The width of the layer after them.
        **kwargs: Arguments of torchvision's ``FasterRCNN``, such as ``min_size``.

    Raises:
        ValueError: There is no such depth, number of stages or norm.
        TypeError: There is no such argument.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes counts the background: at least 2, but got {num_classes}")
    _check_arguments(kwargs, FasterRCNN)
    norms = norm_layer(norm)
    backbone = _backbone(depth, norms, stages, channels, stride_in_1x1)
    parts = _box_parts(norms, stages, channels, box_convs, fc_channels, num_classes)
    model = FasterRCNN(backbone, **parts | kwargs)
    return _finished(model, weight_standardization, weights_backbone)


def panoptic_fpn_resnet(
    *,
    depth: int = 50,
    norm: str = "GN_PRACTICAL",
    weight_standardization: bool = False,
    stride_in_1x1: bool = False,
    weights_backbone: str = "",
    num_things: int = 80,
    num_stuff: int = 53,
    stages: int = 4,
    channels: int = 256,
    box_convs: int = 4,
    fc_channels: int = 1024,
    mask_convs: int = 4,
    semantic_channels: int = 128,
    **kwargs: Any,
) -> PanopticFPN:
    """Panoptic FPN with a ResNet-FPN backbone: see :class:`PanopticFPN`.

    Args:
        depth, norm, weight_standardization, stride_in_1x1, weights_backbone, stages, channels,
            box_convs, fc_channels: As in :func:`fasterrcnn_resnet_fpn`.
        num_things, num_stuff: The numbers of classes, by default COCO's.
        mask_convs: The number of convolutions in the mask head.
        semantic_channels: The width of the semantic branch.
        **kwargs: Arguments of ``PanopticFPN`` and torchvision's ``MaskRCNN``.

    Raises:
        ValueError, TypeError: As in :func:`fasterrcnn_resnet_fpn`.
    """
    check_width("num_things", num_things)
    check_width("num_stuff", num_stuff)
    check_width("semantic_channels", semantic_channels)
    if mask_convs < 0:
        raise ValueError(f"mask_convs must be at least 0, got {mask_convs}")
    if num_stuff >= IGNORE_LABEL:
        raise ValueError(
            f"num_stuff must be below {IGNORE_LABEL}, the label of what is ignored; got {num_stuff}"
        )
    _check_arguments(kwargs, MaskRCNN, PanopticFPN)
    levels, norms = LEVELS[:stages], norm_layer(norm)
    backbone = _backbone(depth, norms, stages, channels, stride_in_1x1)
    parts = _box_parts(norms, stages, channels, box_convs, fc_channels, num_things + 1) | {
        "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(channels, [channels] * mask_convs, 1, norms),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_things + 1),
    }
    branch = SemanticBranch(levels, channels, semantic_channels, num_stuff + 1, norms)
    model = PanopticFPN(backbone, semantic_branch=branch, **parts | kwargs)
    return _finished(model, weight_standardization, weights_backbone)


def _backbone(
    depth: int, norms: NormLayer, stages: int, channels: int, stride_in_1x1: bool
) -> BackboneWithFPN:
    check_width("channels", channels)
    if not isinstance(stride_in_1x1, bool):
        raise ValueError(f"stride_in_1x1 must be True or False, got {stride_in_1x1!r}")
    if not isinstance(depth, int) or depth not in DEPTHS:
        raise ValueError(f"depth must be one of {DEPTHS}, got {depth!r}")
    if stages not in (1, 2, 3, 4):
        raise ValueError(f"stages must be 1 to 4, got {stages!r}")
    body = getattr(resnet, f"resnet{depth}")(weights=None, norm_layer=norms)
    for block in body.modules():
        if stride_in_1x1 and isinstance(block, resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    widths = [body.inplanes >> shift for shift in (3, 2, 1, 0)][:stages]
    layers = {f"layer{i + 1}": level for i, level in enumerate(LEVELS[:stages])}
    return BackboneWithFPN(body, layers, widths, channels, norm_layer=norms)


def _box_parts(
    norms: NormLayer, stages: int, channels: int, convs: int, fc_channels: int, num_classes: int
) -> dict[str, Any]:
    """Arguments of torchvision's models: anchors, and what belongs to the boxes."""
    check_width("fc_channels", fc_channels)
    if convs < 0:
        raise ValueError(f"box_convs must be at least 0, got {convs}")
    sizes = tuple((32 * 2**i,) for i in range(stages + 1))
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(LEVELS[:stages], output_size=7, sampling_ratio=2),
        "box_head": FastRCNNConvFCHead((channels, 7, 7), [channels] * convs, [fc_channels], norms),
        "box_predictor": FastRCNNPredictor(fc_channels, num_classes),
    }


def _check_arguments(kwargs: dict[str, Any], *classes: type) -> None:
    """Raise TypeError for a name that no class takes; torchvision's classes ignore it."""
    known = {name for cls in classes for name in inspect.signature(cls).parameters}
    known -= {"backbone", "num_classes", "kwargs"}
    if "num_classes" in kwargs:
        raise TypeError("Panoptic FPN has num_things and num_stuff instead of num_classes")
    for name in kwargs.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"unknown argument {name!r}{hint}")


def _finished(model: Any, weight_standardization: bool, weights_backbone: str) -> Any:
    if not isinstance(weight_standardization, bool):
        raise ValueError(
            f"weight_standardization must be True or False, got {weight_standardization!r}"
        )
    if weight_standardization:
        apply_weight_standardization(model, ["backbone", "roi_heads.box_head"])
    if weights_backbone:
        TorchvisionCheckpointer(model, mismatch="warn").load_backbone(weights_backbone)
    return model
