"""Conversions of known models against lists of their layers made by hand."""

import pytest
import torch

from gnpractical import (
    convert,
    group_report,
)


def resnet_layer(norm):
    if norm.endswith("downsample.1"):
        return norm[:-1] + "0"
    return norm.replace("bn", "conv")


def densenet_layers(norm):
    """DenseNet-121's, by hand: norm1 and the transitions see all features so far."""
    depths = {1: 6, 2: 12, 3: 24, 4: 16}
    path = norm.split(".")
    if path[-1] == "norm0":
        return ("features.conv0",)
    if path[-1] == "norm2" and len(path) == 4:
        return (norm.replace("norm2", "conv1"),)
    if len(path) == 4:  # features.denseblockB.denselayerL.norm1
        block, count = int(path[1][-1]), int(path[2][len("denselayer") :]) - 1
    else:  # features.transitionB.norm, features.norm5
        block = int(path[1][-1]) if path[1].startswith("transition") else 4
        count = depths[block]
    first = "features.conv0" if block == 1 else f"features.transition{block - 1}.conv"
    prefix = f"features.denseblock{block}.denselayer"
    return (first, *(f"{prefix}{i}.conv2" for i in range(1, count + 1)))


def sequential_layer(norm):  # MobileNetV3's Conv2dNormActivation, and the like
    parent, _, index = norm.rpartition(".")
    return f"{parent}.{int(index) - 1}"


@pytest.mark.parametrize(
    "name, count, expected",
    [
        ("resnet50", 53, lambda n: (resnet_layer(n),)),
        ("densenet121", 121, densenet_layers),
        ("mobilenet_v3_large", 46, lambda n: (sequential_layer(n),)),
    ],
)
def test_torchvision_models_against_lists_made_by_hand(name, count, expected):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None)
    conversion = convert(model, torch.randn(1, 3, 64, 64), rule="practical")
    assert len(conversion.norms) == count
    for norm in conversion.norms:
        assert norm.layers == expected(norm.name), norm.name
        fed = [model.get_submodule(layer) for layer in norm.layers]
        assert norm.in_channels == sum(layer.in_channels for layer in fed)
        assert norm.num_channels == sum(layer.out_channels for layer in fed)
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def converted_resnet50():
    torchvision = pytest.importorskip("torchvision")
    return convert(torchvision.models.resnet50(), torch.randn(1, 3, 224, 224), rule="practical")


def test_resnet50_group_counts():
    norms = converted_resnet50().norms
    assert len(norms) == 53 and all(norm.layers and not norm.skipped_reason for norm in norms)
    counts = {
        "1": [n for n in norms if n.num_groups == 1],
        "C": [n for n in norms if n.num_groups == n.num_channels],
    }
    assert {key: len(of) for key, of in counts.items()} == {"1": 38, "C": 12}
    # (256 - 128)/4, (512 - 256)/4 and (1024 - 512)/4: where a stage narrows to half.
    others = {n.name: n.num_groups for n in norms if n not in counts["1"] + counts["C"]}
    assert others == {"layer2.0.bn1": 32, "layer3.0.bn1": 64, "layer4.0.bn1": 128}


def detectron2_path(norm):
    """bn1 -> stem.conv1.norm, layer1.0.bn2 -> res2.0.conv2.norm, .downsample.1 -> .shortcut.norm"""
    if norm == "bn1":
        return "stem.conv1.norm"
    stage, block, *rest = norm.split(".")
    layer = "shortcut" if rest[0] == "downsample" else rest[0].replace("bn", "conv")
    return f"res{int(stage.removeprefix('layer')) + 1}.{block}.{layer}.norm"


def test_resnet50_is_detectron2s_layer_by_layer():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    import gnpractical.d2  # noqa: F401 - teaches Detectron2 the name GN_PRACTICAL

    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.NORM = "GN_PRACTICAL"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    theirs = {
        row.name: (row.in_channels, row.out_channels, row.num_groups)
        for row in group_report(build_backbone(cfg))
    }
    ours = {
        detectron2_path(n.name): (n.in_channels, n.num_channels, n.num_groups)
        for n in converted_resnet50().norms
    }
    assert ours == theirs


@pytest.mark.slow
def test_mask_rcnn():
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    conversion = convert(model, ([torch.rand(3, 64, 64)],), on_unpaired="keep")
    layers = {norm.name: norm.layers for norm in conversion.norms}
    assert not any(norm.skipped_reason for norm in conversion.norms)
    assert layers["backbone.fpn.inner_blocks.1.1"] == ("backbone.fpn.inner_blocks.1.0",)
    assert layers["backbone.fpn.layer_blocks.3.1"] == ("backbone.fpn.layer_blocks.3.0",)
    assert layers["roi_heads.box_head.2.1"] == ("roi_heads.box_head.2.0",)
    assert layers["roi_heads.mask_head.0.1"] == ("roi_heads.mask_head.0.0",)
    body = "backbone.body."
    for name, fed in layers.items():
        if name.startswith(body):
            assert fed == (body + resnet_layer(name.removeprefix(body)),)
