import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import build_model
from torch import nn

from gnpractical.d2 import load_config
from gnpractical.layers.weight_standardization import (
    WSConv2d,
    apply_weight_standardization,
    standardize_weight,
)

R18 = [
    "MODEL.RESNETS.NORM",
    "GN_PRACTICAL",
    "MODEL.FPN.NORM",
    "GN_PRACTICAL",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "64",
    "MODEL.DEVICE",
    "cpu",
    "MODEL.RESNETS.DEPTH",
    "18",
    "MODEL.BACKBONE.NAME",
    "build_gnp_resnet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES",
    "['res2','res3','res4','res5']",
    "MODEL.RESNETS.OUT_FEATURES",
    "['res2','res3','res4','res5']",
    "MODEL.FPN.OUT_CHANNELS",
    "32",
    "MODEL.META_ARCHITECTURE",
    "SemanticSegmentor",
]


def small_model(*opts):
    return build_model(load_config("", [*R18, *opts]))


def test_detectron2_conv_equals_plain_one_with_standardized_weight():
    conv = Conv2d(6, 8, 3, norm=get_norm("GN_4", 8), activation=nn.functional.relu)
    x = torch.randn(2, 6, 7, 7)
    plain = nn.functional.conv2d(x, standardize_weight(conv.weight), conv.bias)
    expected = nn.functional.relu(conv.norm(plain))
    keys = list(conv.state_dict())
    model = nn.Sequential(conv)
    assert apply_weight_standardization(model, ["0"]) == ["0"]
    torch.testing.assert_close(model(x), expected)
    assert list(model[0].state_dict()) == keys
    assert conv(torch.randn(0, 6, 7, 7)).shape == (0, 8, 5, 5)


def test_plain_conv_beside_its_norm():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    wrapped = nn.ModuleDict({"body": model})
    assert apply_weight_standardization(wrapped, ["body"]) == ["body.0"]
    assert type(model[0]) is WSConv2d
    assert type(model[2]) is nn.Conv2d  # no norm follows
    apply_weight_standardization(wrapped, ["body"])  # twice is once
    assert type(model[0]) is WSConv2d


def test_applied_by_config_to_the_named_parts_only():
    model = small_model("MODEL.GNP.WEIGHT_STANDARDIZATION", "['backbone']")
    parts = {n.split(".")[0] for n, m in model.named_modules() if isinstance(m, WSConv2d)}
    assert parts == {"backbone"}
    count = sum(isinstance(m, WSConv2d) for m in model.backbone.modules())
    assert count == sum(isinstance(m, nn.Conv2d) for m in model.backbone.modules())
    assert not any(isinstance(m, WSConv2d) for m in small_model().modules())


def test_same_state_dict_keys_with_and_without():
    with_ws = small_model("MODEL.GNP.WEIGHT_STANDARDIZATION", "['backbone', 'sem_seg_head']")
    assert list(with_ws.state_dict()) == list(small_model().state_dict())


def test_prefix_that_matches_nothing():
    with pytest.raises(ValueError, match="'backbon' has no weight layer.*start with one of: back"):
        small_model("MODEL.GNP.WEIGHT_STANDARDIZATION", "['backbon']")


def test_deformable_convolutions_are_left_and_said(caplog):
    from detectron2.layers import DeformConv

    model = nn.Sequential(DeformConv(4, 8, 3, norm=get_norm("GN_4", 8)))
    assert apply_weight_standardization(model, ["0"]) == []
    assert "DeformConv" in caplog.text
