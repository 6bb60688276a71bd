"""ImageNet weights of ResNets as others published them, whatever their files call the tensors.

By torchvision's names (see ``resnet_names``) weights of any origin find their place. The rest,
which their shapes do not say, is known of each origin: norms, weight standardization, strides and
what images they expect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.runs.group_record import GroupRecord
from gnpractical.runs.resnet_names import (
    STATISTICS,
    is_caffe2s,
    is_detectron2s,
    of_detectors,
    torchvision_name,
)

# Torchvision's, of RGB pixels from 0 to 255.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


@dataclass(frozen=True)
class PretrainedResNet:
    """A ResNet's weights, and what is known of it.

    Attributes:
        tensors: By torchvision's names.
        record: Of each norm, by torchvision's name, what checkpoints record of it. A
            "FrozenBatchNorm2d" has its statistics in weight and bias.
        other: The file's keys that belong to no ResNet, such as a classifier's.
        stride_in_1x1: Whether bottlenecks stride in their first convolution, as MSRA's do.
        bgr: Whether the channels of its images are blue, green, red.
        pixel_mean, pixel_std: What is subtracted from pixels of 0 to 255, and what they are then
            divided by, in the order of its channels.
    """

    tensors: dict[str, Tensor]
    record: GroupRecord
    other: tuple[str, ...]
    stride_in_1x1: bool
    bgr: bool
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    @property
    def depth(self) -> int | None:
        """Its number of weight layers; None for an arrangement that has no name."""
        blocks = {".".join(name.split(".")[:2]) for name in self.tensors}
        counts = tuple(sum(b.startswith(f"layer{i}.") for b in blocks) for i in (1, 2, 3, 4))
        return _DEPTHS.get(("layer1.0.conv3.weight" in self.tensors, counts))

    @property
    def num_groups(self) -> int:
        """How many groups the 3x3 convolutions have: more than 1 in a ResNeXt."""
        weight = self.tensors["layer1.0.conv2.weight"]
        return weight.shape[0] // weight.shape[1]

    @property
    def width_per_group(self) -> int:
        return self.tensors["layer1.0.conv2.weight"].shape[1]

    def __str__(self) -> str:
        kind = f"ResNet-{self.depth}" if self.depth else "ResNet"
        if self.num_groups > 1:
            kind = f"ResNeXt-{self.depth} {self.num_groups}x{self.width_per_group}d"
        entry = self.record["bn1"]
        norm = entry["norm"].replace("2d", "").replace("FrozenB", "frozen B")
        if entry["num_groups"]:
            counts = {e["num_groups"] for e in self.record.values()}
            count = counts.pop() if len(counts) == 1 else "several counts of"
            norm = f"GroupNorm of {count} groups{' (assumed)' if entry.get('assumed') else ''}"
        standardized = " and weight standardization" if entry["weight_standardized"] else ""
        return f"{kind} with {norm}{standardized}"

    def for_rgb(self) -> PretrainedResNet:
        """The same function of RGB images with torchvision's mean and deviation, exactly.

        The mean is the same for all; the rest is a matter of the stem's weights.
        """
        if not self.bgr:
            return self
        scale = torch.tensor(_STD) / torch.tensor(self.pixel_std[::-1])
        weight = self.tensors["conv1.weight"].flip(1) * scale.view(1, 3, 1, 1)
        tensors = self.tensors | {"conv1.weight": weight}
        return replace(self, tensors=tensors, bgr=False, pixel_mean=_MEAN, pixel_std=_STD)


def recognize(weights: Mapping[str, Any], record: GroupRecord) -> PretrainedResNet | None:
    """The ResNet in a file, or None if its keys are those of none.

    Args:
        weights: The file's tensors or arrays.
        record: What the file records of its norms, if this project wrote it; else it is empty.

    Raises:
        ValueError: It is a ResNet of another structure, such as a pre-activation one.
    """
    names = {key: name for key in weights if (name := torchvision_name(key))}
    caffe2 = any(is_caffe2s(key) for key in names)
    if any(key.startswith("backbone.") and is_detectron2s(key) for key in names):
        return None  # a whole model of Detectron2's, of which it is not known what images it takes
    if caffe2 and of_detectors(weights):
        return None  # a whole model of Detectron1's, which Detectron2 reads
    if len(set(names.values())) < len(names):
        first = {name: key for key, name in reversed(names.items())}
        both = next((first[name], key) for key, name in names.items() if first[name] != key)
        raise ValueError(
            f"it holds several ResNets: {both[0]!r} and {both[1]!r} are the same tensor"
        )
    if any(re.search(r"stages\.\d+\.blocks\.\d+\.norm1\.weight$", key) for key in weights):
        raise ValueError(
            "it holds a pre-activation ResNet (timm's resnetv2, BiT), whose norms stand before "
            "their convolutions: no backbone here has this structure. Take weights of a ResNet "
            "whose norms follow them, such as resnet50_gn"
        )
    tensors = {name: torch.as_tensor(weights[key]) for key, name in names.items()}
    # Caffe2's convolutions may have biases of zero.
    biases = {n for n in tensors if re.search(r"(conv\d|downsample\.0)\.bias$", n)}
    tensors = {n: tensor for n, tensor in tensors.items() if n not in biases or tensor.any()}
    if "layer1.0.conv1.weight" not in tensors:
        return None
    stray = [k for k in weights if k not in names and re.search(r"(^|\.)(layer|res)\d\.\d+\.", k)]
    if "conv1.weight" not in tensors or stray:
        raise ValueError(
            f"it holds a ResNet with a part that the backbones here lack, such as a stem of three "
            f"convolutions or attention: {stray[0] if stray else 'conv1.0.weight'!r}. Take the "
            f"weights of a plain ResNet or ResNeXt"
        )
    norms = {
        n.rpartition(".")[0] for n in tensors if re.search(r"(bn\d|downsample\.1)\.weight$", n)
    }
    own = {torchvision_name(f"{key}.weight"): entry for key, entry in record.items()}
    if own.keys() >= {f"{name}.weight" for name in norms}:
        found = {name: own[f"{name}.weight"] for name in norms}
    else:
        found = dict.fromkeys(norms, _published_norm(names, tensors))
    lacking = [
        f"{name}.{end}"
        for name, entry in found.items()
        for end in ("running_mean", "running_var")
        if entry["norm"] in ("BatchNorm2d", "SyncBatchNorm") and f"{name}.{end}" not in tensors
    ]
    if lacking:
        raise ValueError(
            f"it holds a ResNet whose BatchNorms lack {len(lacking)} of their statistics, first "
            f"{lacking[0]}"
        )
    folded = any(e["norm"] == "FrozenBatchNorm2d" for e in found.values())
    other = tuple(key for key in weights if key not in names)
    resnet = PretrainedResNet(tensors, found, other, False, False, _MEAN, _STD)
    if not (caffe2 or folded):
        return resnet
    # MSRA's and the GroupNorm ones are trained on pixels as they are, the ResNeXts not.
    plain = resnet.num_groups == 1
    return replace(
        resnet,
        stride_in_1x1=folded and plain,
        bgr=True,
        pixel_mean=_MEAN[::-1],
        pixel_std=(1.0, 1.0, 1.0) if plain else _STD[::-1],
    )


def place(
    resnet: PretrainedResNet, model: nn.Module, advice: str
) -> tuple[dict[str, Tensor], GroupRecord]:
    """Its tensors and its record by the names that they have in ``model``.

    Statistics of a BatchNorm keep a name there even if the model has a GroupNorm.

    Args:
        advice: How to build a model of its depth and widths, for the error.

    Raises:
        ValueError: The model has no ResNet, or one of another depth or other widths.
    """
    places = {name: key for key in model.state_dict() if (name := torchvision_name(key))}
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if not places:
        raise ValueError("it holds a ResNet, and the model has none: choose a ResNet backbone")
    missing = [n for n in places if n not in resnet.tensors and not n.endswith(STATISTICS)]
    differing = [
        n for n in places if n in resnet.tensors and resnet.tensors[n].shape != shapes[places[n]]
    ]
    # Blocks that the model does not have; a model may end before the last stage.
    stages = {name.split(".")[0] for name in places}
    surplus = [
        name
        for name in resnet.tensors
        if name not in places and name.split(".")[0] in stages and not name.endswith(STATISTICS)
    ]
    for names, what in ((missing, "missing in the file"), (surplus, "missing in the model")):
        if names:
            raise ValueError(
                f"it holds a {resnet}, not the model's: {len(names)} tensors are {what}, first "
                f"{names[0]}. Choose {advice}"
            )
    if differing:
        name = differing[0]
        raise ValueError(
            f"it holds a {resnet}, not the model's: {len(differing)} tensors have other shapes, "
            f"first {name}: {tuple(resnet.tensors[name].shape)} in the file, "
            f"{tuple(shapes[places[name]])} in the model. Choose {advice}"
        )
    paths = {n.rpartition(".")[0]: key.rpartition(".")[0] for n, key in places.items()}
    tensors = {
        f"{paths[layer]}.{end}": tensor
        for name, tensor in resnet.tensors.items()
        for layer, _, end in [name.rpartition(".")]
        if layer in paths
    }
    return tensors, {paths[name]: of for name, of in resnet.record.items() if name in paths}


def strides_in_1x1(model: nn.Module) -> bool | None:
    """Whether the bottlenecks of the model's ResNet stride in their first convolution; None if it
    has none that strides."""
    strides = {
        name: module.stride
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and (name := torchvision_name(f"{path}.weight"))
    }
    if "layer2.0.conv3.weight" not in strides:
        return None
    return strides["layer2.0.conv1.weight"] != (1, 1)


def _published_norm(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the norms of a file without a record are, by its keys."""
    has_statistics = any(name.endswith(("running_mean", "running_var")) for name in tensors)
    if has_statistics and not _is_neutral(tensors):
        return {"num_groups": None, "norm": "BatchNorm2d", "weight_standardized": False}
    if has_statistics or any("_bn_" in key for key in names):
        return {"num_groups": None, "norm": "FrozenBatchNorm2d", "weight_standardized": False}
    # All that are published have 32.
    entry = {"num_groups": 32, "norm": "GN", "assumed": True}
    return entry | {"weight_standardized": _looks_standardized(tensors)}


def _is_neutral(tensors: Mapping[str, Tensor]) -> bool:
    mean, variance = (tensors.get(f"bn1.running_{kind}") for kind in ("mean", "var"))
    if mean is None or variance is None:
        return False
    return bool((mean == 0).all() and torch.allclose(variance, variance.new_ones(()), atol=1e-4))


def _looks_standardized(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the filters' means are nothing beside their deviations.

    Under weight standardization the mean of a filter gets no gradient, and weight decay brings it
    to zero. Other filters of n values have means of 1/sqrt(n) deviations or more.
    """
    shares = []
    for tensor in tensors.values():
        if tensor.dim() == 4:
            filters = tensor.flatten(1).double()
            n = filters.shape[1]
            shares.append(float((n * filters.mean(1) ** 2 / filters.var(1)).mean()))
    return sorted(shares)[len(shares) // 2] < 0.05
