"""Every model of torchvision, and one or more of each family of timm's, converted and trained a
step on the smallest input that works.

By default the smallest of each family of torchvision and a few of timm. All of them (2 minutes on
one core, 7 GB):

    GNP_ALL_MODELS=1 python -m pytest tests/layers/test_convert_models.py
"""

import os
import re

import pytest
import torch
from helpers.converted_models import assert_all_reached, backward, converted
from torch import nn

from gnpractical import convert

pytestmark = pytest.mark.slow

# The rest of torchvision's families differ from these in depth and width only.
REPRESENTATIVES = """
    densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18
    resnet50 resnext50_32x4d shufflenet_v2_x0_5 vgg11_bn wide_resnet50_2
    deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn
    keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2
    ssdlite320_mobilenet_v3_large
""".split()
WITHOUT_NORMS = re.compile(r"alexnet|convnext_|squeezenet|swin_|vit_|vgg\d+$|ssd300_vgg16")
# The others run on 64 x 64. Inception's auxiliary head pools 17 x 17, MaxViT has 7 x 7 windows.
SIZES = {"inception_v3": 299, "maxvit_t": 224}


KINDS = ("", "segmentation", "detection")  # the submodules of torchvision.models


def torchvision_names(kind, without_norms=False):
    try:
        from torchvision import models
    except ImportError:
        return []
    names = models.list_models(getattr(models, kind) if kind else models)
    names = [name for name in names if bool(WITHOUT_NORMS.match(name)) == without_norms]
    if without_norms or os.environ.get("GNP_ALL_MODELS"):
        return names
    return [name for name in names if name in REPRESENTATIVES]


def build(name, kind="", **kwargs):
    models = pytest.importorskip("torchvision").models
    if kind:
        kwargs["weights_backbone"] = None
    return models.get_model(name, weights=None, **kwargs)


@pytest.mark.parametrize("name", torchvision_names(""))
def test_torchvision_classification(name):
    model = build(name)
    x = torch.randn(1, 3, SIZES.get(name, 64), SIZES.get(name, 64))
    norms, left = converted(model, x)
    assert norms and not left
    assert_all_reached(norms, backward(model, model.train()(x)))


@pytest.mark.parametrize("name", torchvision_names("segmentation"))
def test_torchvision_segmentation(name):
    model, x = build(name, "segmentation"), torch.randn(1, 3, 64, 64)
    norms, left = converted(model, x)
    assert norms and not left
    assert_all_reached(norms, backward(model, model.train()(x)))


@pytest.mark.parametrize("name", torchvision_names("detection"))
def test_torchvision_detection(name):
    small = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    model = build(name, "detection", **small)
    image = torch.rand(3, 64, 64)
    norms, left = converted(model, ([image],))
    assert norms and not left
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 48.0, 56.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 20.0),
    }
    losses = model.train()([image], [target])
    assert_all_reached(norms, backward(model, losses))


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in KINDS for name in torchvision_names(kind, True)]
)
def test_torchvision_without_norms(kind, name):
    with torch.device("meta"):  # neither memory nor initialization
        model = build(name, kind)
    with pytest.raises(ValueError, match="has no BatchNorm or GroupNorm to convert"):
        convert(model, torch.randn(1, 3, 64, 64))


# name -> how many norms are left; the reason must be that they get a part of a layer's output, or
# a concatenation of such parts (a split tensor), or an attention's product.
TIMM = {
    "resnet18": 0,
    "resnet26t": 0,
    "resnet50d": 0,
    "resnetrs50": 0,
    "resnetaa50": 0,
    "resnext26ts": 0,
    "resnext50_32x4d": 0,
    "seresnext26t_32x4d": 0,
    "ecaresnet26t": 0,
    "skresnet18": 0,
    "resnest14d": 0,
    "res2net50_14w_8s": 0,
    "resnetv2_18": 0,
    "resnetv2_50": 0,
    "resnetv2_50d_gn": 0,
    "resnetv2_50x1_bit": 0,
    "regnetx_002": 0,
    "regnety_002": 0,
    "regnetz_005": 0,
    "regnetv_040": 0,
    "densenet121": 0,
    "densenetblur121d": 0,
    "efficientnet_b0": 0,
    "efficientnet_b0_g8_gn": 0,
    "efficientnetv2_rw_t": 0,
    "mixnet_s": 0,
    "mobilenetv2_050": 0,
    "mobilenetv3_small_050": 0,
    "mobilenetv4_conv_small_035": 0,
    "mnasnet_small": 0,
    "lcnet_035": 0,
    "fbnetv3_b": 0,
    "tinynet_e": 0,
    "ghostnet_050": 0,
    "ghostnetv3_050": 0,
    "rexnet_100": 0,
    "hrnet_w18_small": 0,
    "inception_v3": 0,
    "inception_v4": 0,
    "xception41p": 0,
    "legacy_xception": 0,
    "vgg16_bn": 0,
    "repvgg_a0": 0,
    "mobileone_s0": 0,
    "repvit_m0_9": 0,
    "dla34": 0,
    "dla60_res2net": 0,
    "vovnet39a": 0,
    "ese_vovnet19b_slim_dw": 0,
    "cspdarknet53": 0,
    "cs3darknet_s": 0,
    "hgnetv2_b0": 0,
    "selecsls42": 0,
    "tresnet_m": 0,
    "convmixer_768_32": 0,
    "poolformer_s12": 0,
    "starnet_s1": 0,
    "mobilevit_xxs": 0,
    "levit_128s": 0,
    "coatnet_bn_0_rw_224": 0,
    "efficientformerv2_s0": 0,
    "fastvit_t8": 0,
    "xcit_nano_12_p16_224": 0,
    "pnasnet5large": 0,
    "dpn68b": 25,
    "botnet26t_256": 3,
    "lambda_resnet26t": 9,
    "inception_next_atto": 12,
}
TIMM_WITHOUT_NORMS = ["convnext_atto", "vit_tiny_patch16_224", "nfnet_l0", "resnetv2_50d_evos"]
TIMM_SIZES = {"lambda_resnet26t": 256, "inception_v3": 299, "inception_v4": 299}


TIMM_REPRESENTATIVES = [
    "resnet26t",
    "resnest14d",
    "resnetv2_50d_gn",
    "regnetz_005",
    "densenetblur121d",
    "mixnet_s",
    "hrnet_w18_small",
    "repvgg_a0",
    "levit_128s",
    "fastvit_t8",
    "dpn68b",
    "botnet26t_256",
]


@pytest.mark.parametrize("name", TIMM if os.environ.get("GNP_ALL_MODELS") else TIMM_REPRESENTATIVES)
def test_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3)
    size = model.default_cfg["input_size"][-1]
    if not model.default_cfg.get("fixed_input_size"):
        size = TIMM_SIZES.get(name, 64)
    x = torch.randn(1, 3, size, size)
    norms, left = converted(model, x)
    assert norms and len(left) == TIMM[name]
    assert all("output channels" in norm.skipped_reason for norm in left)
    assert_all_reached(norms, backward(model, model.train()(x)))


@pytest.mark.parametrize("name", TIMM_WITHOUT_NORMS)
def test_timm_without_norms(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="has no BatchNorm or GroupNorm to convert"):
        convert(model)


def test_timm_norms_keep_the_activation_inside_them():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnetv2_50", num_classes=3)
    conversion = convert(model, torch.randn(1, 3, 64, 64))
    layers = {norm.name: norm.layers for norm in conversion.norms}
    assert layers["stages.0.blocks.0.norm1"] == ("stem.conv",)
    assert layers["stages.0.blocks.0.norm2"] == ("stages.0.blocks.0.conv1",)
    assert layers["stages.0.blocks.1.norm1"] == ("stages.0.blocks.0.conv3",)
    assert layers["norm"] == ("stages.3.blocks.2.conv3",)
    assert isinstance(model.norm.act, nn.ReLU)
    assert model.norm(torch.randn(1, 2048, 2, 2)).min() == 0
