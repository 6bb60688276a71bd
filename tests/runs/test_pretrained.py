"""Every published format into both frameworks, by a mapping of the test's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed")
from helpers.resnet_files import SMALL, randomized, write
from torchvision.models import resnet50

from gnpractical.runs.group_record import GroupMismatch
from gnpractical.runs.pretrained import recognize
from gnpractical.runs.resnet_names import torchvision_name
from gnpractical.tv import fasterrcnn_resnet_fpn
from gnpractical.tv.checkpoint import TorchvisionCheckpointer

CONFIGS = Path(__file__).parents[2] / "configs"


def group_norm(channels):
    return nn.GroupNorm(32, channels)


@pytest.fixture(scope="module")
def sources():
    """State dicts of a ResNet-50: with BatchNorm, GroupNorm, GroupNorm and standardization."""
    bn = randomized(resnet50()).state_dict()
    gn = randomized(resnet50(norm_layer=group_norm)).state_dict()
    ws = {k: v - v.mean((1, 2, 3), keepdim=True) if v.dim() == 4 else v for k, v in gn.items()}
    return {"bn": bn, "gn": gn, "gn_ws": ws}


def caffe2(state, norm):
    """Torchvision's names as Caffe2's, written out."""
    names = {}
    for key in state:
        layer, end = key.rsplit(".", 1)
        if end not in ("weight", "bias"):
            continue
        if layer == "fc":
            names[key] = f"fc1000_{end[0]}"
            continue
        parts = layer.split(".")
        is_norm = parts[-1].startswith("bn") or parts[-2:] == ["downsample", "1"]
        suffix = f"_{norm}_{'s' if end == 'weight' else 'b'}" if is_norm else f"_{end[0]}"
        if len(parts) == 1:
            names[key] = ("res_conv1" if norm == "bn" and is_norm else "conv1") + suffix
            continue
        branch = "branch1" if "downsample" in layer else f"branch2{'abc'[int(parts[2][-1]) - 1]}"
        names[key] = f"res{int(parts[0][-1]) + 1}_{parts[1]}_{branch}{suffix}"
    return {new: state[old] for old, new in names.items()}


def detectron2_name(name):
    """Torchvision's name as Detectron2's, written out."""
    if name in ("conv1.weight",):
        return f"stem.{name}"
    if name.startswith("bn1."):
        return name.replace("bn1.", "stem.conv1.norm.")
    for k in (1, 2, 3, 4):
        name = name.replace(f"layer{k}.", f"res{k + 1}.")
    for k in (1, 2, 3):
        name = name.replace(f".bn{k}.", f".conv{k}.norm.")
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


# The file's name, its source, what is written, and the norm, standardization and stride it has.
FORMATS = {
    "torchvision.pth": ("bn", lambda s: s, "BN", False, False),
    "timm.safetensors": ("gn", lambda s: s, "GN", False, False),
    "jhu.pth": (
        "gn_ws",
        lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}},
        "GN",
        True,
        False,
    ),
    "mmdet.pth": (
        "gn_ws",
        lambda s: {"state_dict": {f"backbone.{k.replace('bn', 'gn')}": v for k, v in s.items()}},
        "GN",
        True,
        False,
    ),
    "ppwwyyxx.pth": (
        "gn",
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        "GN",
        False,
        False,
    ),
    "R-50-GN.pkl": ("gn", lambda s: caffe2(s, "gn"), "GN", False, False),
    "MSRA.pkl": ("bn", lambda s: caffe2(s, "bn"), "FrozenBN", False, True),
    "d2_torchvision.pth": (
        "bn",
        lambda s: {"model": {detectron2_name(k): v for k, v in s.items()}},
        "BN",
        False,
        False,
    ),
}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def compared(name, source):
    folded = name == "MSRA.pkl"
    return {
        key: tensor
        for key, tensor in source.items()
        if not key.startswith("fc.") and not (folded and key.endswith(STATISTICS))
    }


@pytest.mark.parametrize("name", FORMATS)
def test_into_torchvision(name, sources, tmp_path):
    kind, written, norm, standardized, stride = FORMATS[name]
    path = write(tmp_path / name, written(sources[kind]))
    torch.manual_seed(0)
    options = {"norm": norm, "weight_standardization": standardized, "stride_in_1x1": stride}
    model = fasterrcnn_resnet_fpn(depth=50, weights_backbone=path, **SMALL, **options)
    loaded = model.backbone.body.state_dict()
    for key, tensor in compared(name, sources[kind]).items():
        if key == "conv1.weight" and name.endswith(".pkl"):
            # Of BGR images as they are: reversed, and scaled to what torchvision divides by.
            std = 255 * torch.tensor([0.229, 0.224, 0.225])
            tensor = tensor[:, [2, 1, 0]] * std.view(1, 3, 1, 1)
        torch.testing.assert_close(loaded[key], tensor, msg=f"{name} {key}")


@pytest.mark.parametrize("name", FORMATS)
def test_into_detectron2(name, sources, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import build_model

    from gnpractical.d2 import load_config
    from gnpractical.d2.checkpoint import GNPCheckpointer

    kind, written, norm, standardized, stride = FORMATS[name]
    path = write(tmp_path / name, written(sources[kind]))
    options = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", norm]
    options += ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.STRIDE_IN_1X1", stride]
    if standardized:
        options += ["MODEL.GNP.WEIGHT_STANDARDIZATION", ["backbone.bottom_up"]]
    if not name.endswith(".pkl"):
        options += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]]
        options += ["MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
    model = build_model(load_config(f"{CONFIGS}/Base-RCNN-FPN.yaml", options))
    GNPCheckpointer(model).load(path, checkpointables=[])
    loaded = model.backbone.bottom_up.state_dict()
    for key, tensor in compared(name, sources[kind]).items():
        if key.endswith("num_batches_tracked") and detectron2_name(key) not in loaded:
            continue  # of a frozen one
        torch.testing.assert_close(loaded[detectron2_name(key)], tensor, msg=f"{name} {key}")


def test_the_same_function(sources, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    for kind, norm_layer, norm in (("bn", None, "BN"), ("gn", group_norm, "GN")):
        path = write(tmp_path / f"{kind}.pth", sources[kind])
        model = fasterrcnn_resnet_fpn(depth=50, norm=norm, weights_backbone=path, **SMALL).eval()
        source = resnet50(norm_layer=norm_layer).eval()
        source.load_state_dict(sources[kind])
        with torch.no_grad():
            stem = source.maxpool(source.relu(source.bn1(source.conv1(x))))
            expected = source.layer4(source.layer3(source.layer2(source.layer1(stem))))
            actual = model.backbone.body(x)["3"]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_disagrees_is_an_error_that_names_what_would_match(sources, tmp_path):
    model = fasterrcnn_resnet_fpn(depth=50, norm="GN_PRACTICAL", **SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {
        "torchvision.pth": "BatchNorm2d, without weight .*--match-batches 2",
        "jhu.pth": "GN, with weight standardization",
        "MSRA.pkl": "--stride-in-1x1",
    }
    for name, message in expected.items():
        path = write(tmp_path / name, FORMATS[name][1](sources[FORMATS[name][0]]))
        with pytest.raises(GroupMismatch, match=message):
            TorchvisionCheckpointer(model).load(path, checkpointables=[])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_names_of_other_tensors_are_none():
    for key in (
        "fc.weight",
        "conv1.0.weight",
        "roi_heads.box_head.conv1.weight",
        "conv2_offset.bias",
    ):
        assert torchvision_name(key) is None
    assert recognize({"features.0.weight": torch.zeros(1)}, {}) is None
