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
from gnpractical.layers.pairing import require_resolved
from gnpractical.layers.weight_standardization import apply_weight_standardization
from gnpractical.num_groups import check_width
from gnpractical.tv.panoptic_fpn import PanopticFPN, SemanticBranch

DEPTHS = (18, 34, 50, 101)
_OTHER_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "GN": partial(nn.GroupNorm, 32),
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}


def norm_layer(norm: str) -> Callable[[int], nn.Module]:
    """What torchvision calls a ``norm_layer``: a function of the number of channels.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
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
    num_classes: int = 91,
    stages: int = 4,
    channels: int = 256,
    box_convs: int = 4,
    fc_channels: int = 1024,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN with a ResNet-FPN backbone and, by default, the 4conv1fc box head.

    Args:
        depth: of the ResNet: 18, 34, 50 or 101. Its weights are random.
        norm: of backbone, FPN and box head: "GN_PRACTICAL", "GN_CLOSEST", "GN_EXACT",
            "GN_MEASURED", "GN_<k>", "GN" (32 groups), "BN", "SyncBN" or "FrozenBN".
        weight_standardization: of all convolutions in backbone, FPN and box head.
        num_classes: with the background, as torchvision counts.
        stages: how many of the ResNet's four stages there are.
        channels: width of the FPN and of the box head's convolutions.
        box_convs, fc_channels: number of these convolutions, width of the layer after them.
        **kwargs: those of torchvision's ``FasterRCNN``, such as ``min_size``.

    Raises:
        ValueError: a depth, number of stages or norm that does not exist.
    """
    check_width("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError("num_classes counts the background, so it must be at least 2; got 1")
    _check_arguments(kwargs, FasterRCNN)
    backbone, levels = _backbone(depth, norm, stages, channels)
    box_head = _box_head(channels, box_convs, fc_channels, norm)
    kwargs = {
        "rpn_anchor_generator": _anchors(levels),
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(fc_channels, num_classes),
    } | kwargs
    return _finish(FasterRCNN(backbone, **kwargs), weight_standardization)


def panoptic_fpn_resnet(
    *,
    depth: int = 50,
    norm: str = "GN_PRACTICAL",
    weight_standardization: bool = False,
    num_things: int = 80,
    num_stuff: int = 53,
    stages: int = 4,
    channels: int = 256,
    box_convs: int = 4,
    fc_channels: int = 1024,
    mask_convs: int = 4,
    semantic_channels: int = 128,
    min_stuff_area: int = 4096,
    **kwargs: Any,
) -> PanopticFPN:
    """Panoptic FPN (arXiv 1901.02446) with a ResNet-FPN backbone: see :class:`PanopticFPN`.

    Args:
        depth, norm, weight_standardization, stages, channels, box_convs, fc_channels: as of
            :func:`fasterrcnn_resnet_fpn`; the norm is that of the mask head and the semantic
            branch, too.
        num_things, num_stuff: without background. The defaults are COCO's.
        mask_convs: number of the mask head's convolutions, ``channels`` wide.
        semantic_channels: width of the semantic branch.
        min_stuff_area: stuff segments of fewer pixels are left out.
        **kwargs: those of torchvision's ``MaskRCNN``.

    Raises:
        ValueError: as :func:`fasterrcnn_resnet_fpn`.
    """
    check_width("num_things", num_things)
    check_width("num_stuff", num_stuff)
    check_width("semantic_channels", semantic_channels)
    if num_stuff >= IGNORE_LABEL:
        raise ValueError(
            f"num_stuff must be below {IGNORE_LABEL}, the label of what is ignored; got {num_stuff}"
        )
    _check_arguments(kwargs, MaskRCNN, PanopticFPN)
    backbone, levels = _backbone(depth, norm, stages, channels)
    kwargs = {
        "rpn_anchor_generator": _anchors(levels),
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        "box_head": _box_head(channels, box_convs, fc_channels, norm),
        "box_predictor": FastRCNNPredictor(fc_channels, num_things + 1),
        "mask_head": MaskRCNNHeads(channels, [channels] * mask_convs, 1, norm_layer(norm)),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_things + 1),
    } | kwargs
    branch = SemanticBranch(levels, channels, semantic_channels, num_stuff + 1, norm_layer(norm))
    model = PanopticFPN(backbone, semantic_branch=branch, min_stuff_area=min_stuff_area, **kwargs)
    return _finish(model, weight_standardization)


def _backbone(
    depth: int, norm: str, stages: int, channels: int
) -> tuple[BackboneWithFPN, list[str]]:
    """The ResNet-FPN, and the names of its levels without the pooled one."""
    if depth not in DEPTHS or isinstance(depth, float):
        raise ValueError(f"depth must be one of {DEPTHS}, got {depth!r}")
    if stages not in (1, 2, 3, 4) or isinstance(stages, float):
        raise ValueError(f"stages must be 1 to 4, got {stages!r}")
    check_width("channels", channels)
    body = getattr(resnet, f"resnet{depth}")(weights=None, norm_layer=norm_layer(norm))
    widths = [body.inplanes >> shift for shift in (3, 2, 1, 0)][:stages]
    levels = [str(i) for i in range(stages)]
    layers = {f"layer{i + 1}": level for i, level in enumerate(levels)}
    return BackboneWithFPN(body, layers, widths, channels, norm_layer=norm_layer(norm)), levels


def _anchors(levels: list[str]) -> AnchorGenerator:
    sizes = tuple((32 * 2**i,) for i in range(len(levels) + 1))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def _box_head(channels: int, convs: int, fc_channels: int, norm: str) -> nn.Module:
    check_width("fc_channels", fc_channels)
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * convs, [fc_channels], norm_layer(norm))


def _check_arguments(kwargs: dict[str, Any], *classes: type) -> None:
    """TypeError for a name no class takes; torchvision's ignore it."""
    known = {name for cls in classes for name in inspect.signature(cls).parameters}
    for name in kwargs:
        if name not in known or name in ("backbone", "num_classes", "kwargs"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown argument {name!r}{hint}")


def _finish(model: Any, weight_standardization: bool) -> Any:
    require_resolved(model)
    if weight_standardization:
        apply_weight_standardization(model, ["backbone", "roi_heads.box_head"])
    return model
