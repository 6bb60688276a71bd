"""What others call the tensors of a ResNet, and what torchvision calls them.

Every tensor, of a file as of a model, has a name in torchvision's ResNet, such as
``layer1.0.conv1.weight``; its norms are called ``bn1`` there, GroupNorms too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ENDS = "weight|bias|running_mean|running_var|num_batches_tracked"
_TORCHVISION = re.compile(
    r"(?:(?:module|backbone|body)\.)*((?:layer[1-4]\.\d+\.)?)"
    rf"(?:(conv[123]|downsample\.[01])|(?:bn|gn|norm)([123]))\.({_ENDS})"
)
_DETECTRON2 = re.compile(
    rf"(?:.*\.)?(?:stem\.(conv1)|res([2-5])\.(\d+)\.(conv[123]|shortcut))(\.norm)?\.({_ENDS})"
)
_CAFFE2 = re.compile(
    r"(?:(?:res_)?(conv1)|res([2-5])_(\d+)_branch(1|2a|2b|2c))(_[bg]n)?_(w|b|s|rm|riv)"
)
_CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_ENDS = {
    "w": "weight",
    "s": "weight",
    "b": "bias",
    "rm": "running_mean",
    "riv": "running_var",
}
# Keys of whole detectors, apart from their backbones.
_OF_DETECTORS = re.compile(r"(^|[._])(rpn|fpn|neck|roi_heads|proposal_generator|cls_score)|_head\.")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def torchvision_name(key: str) -> str | None:
    """What torchvision's ResNet calls a tensor of a file or a model; None if it has no such."""
    if match := _TORCHVISION.fullmatch(key):
        block, layer, norm, end = match.groups()
        return f"{block}{layer or f'bn{norm}'}.{end}"
    if match := _DETECTRON2.fullmatch(key):
        stem, stage, block, layer, norm, end = match.groups()
    elif match := _CAFFE2.fullmatch(key):
        stem, stage, block, branch, norm, end = match.groups()
        layer, end = _CAFFE2_LAYERS.get(branch, ""), _CAFFE2_ENDS[end]
    else:
        return None
    layer = stem or layer or ""
    if layer == "shortcut":
        layer = "downsample.1" if norm else "downsample.0"
    elif norm:
        layer = layer.replace("conv", "bn")
    return f"{layer}.{end}" if stem else f"layer{int(stage) - 1}.{block}.{layer}.{end}"


def is_detectron2s(key: str) -> bool:
    """Whether Detectron2's ResNet calls a tensor so."""
    return _DETECTRON2.fullmatch(key) is not None


def is_caffe2s(key: str) -> bool:
    """Whether Caffe2's ResNet calls a tensor so."""
    return _CAFFE2.fullmatch(key) is not None


def of_detectors(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that belong to a whole detector and not to its backbone."""
    return [key for key in keys if _OF_DETECTORS.search(key)]
