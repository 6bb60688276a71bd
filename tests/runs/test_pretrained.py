"""Every published format into both frameworks, by a mapping of the test's own."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed")

from safetensors.torch import save_file
from torchvision.models import resnet18, resnet50, resnext50_32x4d

from gnpractical.runs.group_record import GroupMismatch
from gnpractical.runs.pretrained import recognize, torchvision_name
from gnpractical.tv import fasterrcnn_resnet_fpn
from gnpractical.tv.checkpoint import TorchvisionCheckpointer

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"num_classes": 3, "channels": 32, "box_convs": 1, "fc_channels": 32}


def group_norm(channels):
    return nn.GroupNorm(32, channels)


def randomized(model):
    torch.manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.1))
    return model


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


def write(path, weights):
    if path.suffix == ".safetensors":
        save_file({k: v.clone() for k, v in weights.items()}, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({k: v.numpy() for k, v in weights.items()}))
    else:
        torch.save(weights, path)
    return str(path)


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


def small(**kwargs):
    return fasterrcnn_resnet_fpn(depth=18, **SMALL, **kwargs)


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


def test_other_depths_and_structures_in_one_line(tmp_path):
    model = small(norm="BN")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    half = dict(list(resnet18().state_dict().items())[:60])
    preactivation = {
        "stem.conv.weight": torch.zeros(1),
        "stages.0.blocks.0.norm1.weight": half["bn1.weight"],
    }
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html></html>")
    cases = {
        write(
            tmp_path / "50.pth", randomized(resnet50()).state_dict()
        ): "ResNet-50 with BatchNorm, .*--depth 50",
        write(tmp_path / "x.pth", resnext50_32x4d().state_dict()): "ResNeXt-50 32x4d",
        write(tmp_path / "half.pth", half): "missing in the file, first",
        write(tmp_path / "pre.pth", preactivation): "pre-activation ResNet",
        write(tmp_path / "fc.pth", {"fc.weight": torch.zeros(2, 2)}): "holds no ResNet",
        str(page): "no checkpoint that can be loaded",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            TorchvisionCheckpointer(model).load_backbone(path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}, "'conv1.weight' .* not finite"),
        ({"bn1.running_var": -torch.ones(64)}, "'bn1.running_var' holds variances below zero"),
        ({"bn1.weight": torch.ones(64, dtype=torch.int64)}, "'bn1.weight' holds torch.int64"),
        ({"bn1.bias": torch.ones(64) + 1j}, "'bn1.bias' holds torch.complex64"),
        ({"bn1.bias": torch.ones(64).to_sparse()}, "'bn1.bias' is sparse"),
        ({"bn1.bias": [0.0] * 64}, "'bn1.bias' is no tensor but a list"),
        ({3: torch.ones(64)}, "holds no tensors by name"),
        ({"module.layer1.0.conv1.weight": torch.ones(1)}, "several ResNets: 'layer1.0.conv1.wei"),
    ],
)
def test_tensors_that_no_model_can_have(tmp_path, changed, message):
    model = small(norm="BN")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / "18.pth"
    torch.save(randomized(resnet18()).state_dict() | changed, path)
    with pytest.raises(ValueError, match=message):
        TorchvisionCheckpointer(model).load_backbone(str(path))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_prefixes_of_wrappers_and_heads_of_other_detectors(tmp_path):
    model = small(norm="GN_1")
    TorchvisionCheckpointer(model, str(tmp_path)).save("own")
    saved = torch.load(tmp_path / "own.pth")["model"]
    torch.save(
        {"model": {f"module._orig_mod.{k}": v for k, v in saved.items()}}, tmp_path / "w.pth"
    )
    other = small(norm="GN_1")
    TorchvisionCheckpointer(other).load(str(tmp_path / "w.pth"), checkpointables=[])
    torch.testing.assert_close(other.state_dict(), saved)

    names = {k.replace("backbone.body.", "net.backbone."): v for k, v in saved.items()}
    whole = {k.removeprefix("net."): v for k, v in names.items()}
    torch.save({"state_dict": whole}, tmp_path / "mmdet.pth")
    with pytest.raises(GroupMismatch, match="whole detector .* left out, first"):
        TorchvisionCheckpointer(other).load(str(tmp_path / "mmdet.pth"), checkpointables=[])


def test_a_count_that_is_assumed_is_said_to_be(tmp_path):
    source = resnet18(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    torch.save(source.state_dict(), tmp_path / "18.pth")
    with pytest.raises(GroupMismatch, match="G=32 .assumed, since the file does not say."):
        TorchvisionCheckpointer(small(norm="GN_1")).load_backbone(str(tmp_path / "18.pth"))


def test_norms_yet_to_be_calibrated_are_other_norms_than_the_files(tmp_path):
    torch.save(randomized(resnet18()).state_dict(), tmp_path / "18.pth")
    model = small(norm="GN_MEASURED")
    with pytest.raises(GroupMismatch, match="BatchNorm2d in the file, GN_MEASURED in the model"):
        TorchvisionCheckpointer(model).load_backbone(str(tmp_path / "18.pth"))
    checkpointer = TorchvisionCheckpointer(model, match=True)
    checkpointer.load_backbone(str(tmp_path / "18.pth"))
    assert len(checkpointer.other_norms.record) == 20


def test_names_of_other_tensors_are_none():
    for key in (
        "fc.weight",
        "conv1.0.weight",
        "roi_heads.box_head.conv1.weight",
        "conv2_offset.bias",
    ):
        assert torchvision_name(key) is None
    assert recognize({"features.0.weight": torch.zeros(1)}, {}) is None


def test_a_flipped_byte_is_found(tmp_path):
    model = small(norm="GN_1")
    TorchvisionCheckpointer(model, str(tmp_path)).save("own")
    path = tmp_path / "own.pth"
    content = bytearray(path.read_bytes())
    weight = model.roi_heads.box_head[-2].weight.detach().numpy().tobytes()[:64]
    content[content.find(weight) + 10] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="own.pth is no checkpoint that can be loaded.*checksum"):
        TorchvisionCheckpointer(model).load(str(path))
