"""Models of MONAI and segmentation_models_pytorch, converted and trained a step."""

import pytest
import torch
from helpers.converted_models import assert_all_reached, backward, converted
from torch import nn

from gnpractical import convert
from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.weight_standardization import STANDARDIZED, Standardized

pytestmark = pytest.mark.slow

# The rules with and without the input width, weight standardization with one of them.
OPTIONS = [("practical", True), ("cpg_4", False)]


def monai(name, norm, **kwargs):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    return getattr(nets, name)(spatial_dims=3, in_channels=1, out_channels=4, norm=norm, **kwargs)


def smp(name):
    library = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
    )
    return getattr(library, name)("resnet18", encoder_weights=None, classes=2)


UNET = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
BASIC_UNET = {"features": (8, 8, 16, 32, 64, 8)}
SEG_RES_NET = {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
VOLUMES, IMAGES = (2, 1, 16, 16, 16), (2, 3, 32, 32)


def check(model, shape, rule, standardized, count, widths):
    """All ``count`` norms are converted, and those named have these widths (in, out)."""
    x = torch.randn(shape)
    before = {name for name, layer in model.named_modules() if type(layer) in STANDARDIZED}
    norms, left = converted(model, x, rule=rule, weight_standardization=standardized)
    assert not left and len(norms) == count
    found = {norm.name: (norm.in_channels, norm.num_channels) for norm in norms}
    assert found | widths == found
    feeding = {name for pair in find_pairs(model) for name in pair.layers}
    # All that feed a norm, but for transposed ones; and no others, as the last one.
    expected = before & feeding if standardized else set()
    assert expected == {n for n, m in model.named_modules() if isinstance(m, Standardized)}
    assert_all_reached(norms, backward(model, model.train()(x)))


@pytest.mark.parametrize("rule, standardized", OPTIONS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "name, options, groups, count, widths",
    [
        (
            *("UNet", UNET, 2, 9),
            {
                "model.0.conv.unit0.adn.N": (1, 8),
                "model.1.submodule.1.submodule.conv.unit1.adn.N": (32, 32),
                # A transposed convolution behind a skip connection: 16 + 32 channels.
                "model.1.submodule.2.0.adn.N": (48, 8),
            },
        ),
        (
            *("BasicUNet", BASIC_UNET, 4, 18),
            {
                "down_4.convs.conv_0.adn.N": (32, 64),
                "upcat_4.convs.conv_0.adn.N": (64, 32),  # 32 of the encoder's and 32 from below
            },
        ),
        (
            *("SegResNet", SEG_RES_NET, 8, 11),
            {
                "down_layers.2.1.norm1": (16, 32),  # which stands before its block's convolution
                "up_layers.0.0.norm1": (32, 16),
                "conv_final.0": (8, 8),
            },
        ),
    ],
)
def test_monai(name, options, groups, count, widths, grouped, rule, standardized):
    norm = ("GROUP", {"num_groups": groups}) if grouped else "BATCH"
    check(monai(name, norm, **options), VOLUMES, rule, standardized, count, widths)


def test_instance_norms_which_monai_has_by_default_stay():
    model = monai("UNet", "INSTANCE", **UNET)
    with pytest.raises(ValueError, match="no BatchNorm.*; its 9 InstanceNorms stay as they are"):
        convert(model, torch.randn(VOLUMES))
    assert sum(isinstance(module, nn.InstanceNorm3d) for module in model.modules()) == 9


@pytest.mark.parametrize("rule, standardized", OPTIONS)
@pytest.mark.parametrize(
    "name, count, widths",
    [
        (
            "Unet",
            30,
            {"encoder.bn1": (3, 64), "decoder.blocks.0.conv1.1": (768, 256)},  # 512 + 256
        ),
        (
            "FPN",  # whose decoder has GroupNorm
            27,
            {
                "encoder.layer2.0.bn1": (64, 128),
                "decoder.seg_blocks.0.block.0.block.1": (256, 128),
            },
        ),
        (
            "DeepLabV3Plus",
            29,
            {"decoder.aspp.0.project.1": (1280, 256), "decoder.block2.1": (304, 256)},
        ),
    ],
)
def test_segmentation_models_pytorch(name, count, widths, rule, standardized):
    check(smp(name), IMAGES, rule, standardized, count, widths)
