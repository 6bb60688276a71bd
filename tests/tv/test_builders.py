import re

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torch
import torchvision
from torch import nn

from gnpractical import group_report
from gnpractical.layers.weight_standardization import WSConv2d
from gnpractical.tv import fasterrcnn_resnet_fpn, panoptic_fpn_resnet, run
from gnpractical.tv.builders import norm_layer

IMAGES = [torch.rand(3, 60, 80), torch.rand(3, 50, 80)]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def counts(model):
    return {
        row.name: (row.in_channels, row.out_channels, row.num_groups) for row in group_report(model)
    }


@pytest.mark.parametrize("depth, norms", [(18, 20), (34, 36), (50, 53), (101, 104)])
def test_every_norm_has_its_own_count(depth, norms):
    model = panoptic_fpn_resnet(depth=depth)
    rows = counts(model)
    # The FPN's two for each of 4 levels, 4 + 4 in the heads, 1 + 1 + 2 + 3 in the branch.
    assert len(rows) == norms + 8 + 8 + 7
    assert len(rows) == sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert rows["semantic_branch.levels.3.4.1"] == (128, 128, 1)
    assert rows["semantic_branch.levels.3.0.1"] == (256, 128, 32)


def detectron2_name(name):
    """The path, in Detectron2's model, of the norm at ``name`` in ours."""
    stage = r"backbone\.body\.layer(\d)\.(\d+)\."
    # The first number is counted from ``offset`` less than there.
    for pattern, path, offset in [
        (r"backbone\.body\.bn1", "backbone.bottom_up.stem.conv1.norm", 0),
        (stage + r"bn(\d)", "backbone.bottom_up.res{}.{}.conv{}.norm", 1),
        (stage + r"downsample\.1", "backbone.bottom_up.res{}.{}.shortcut.norm", 1),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.1", "backbone.fpn_lateral{}.norm", 2),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.1", "backbone.fpn_output{}.norm", 2),
        (r"roi_heads\.box_head\.(\d)\.1", "roi_heads.box_head.conv{}.norm", 1),
        (r"roi_heads\.mask_head\.(\d)\.1", "roi_heads.mask_head.mask_fcn{}.norm", 1),
        (r"semantic_branch\.levels\.(\d)\.(\d)\.1", "sem_seg_head.p{}.{}.norm", 2),
    ]:
        match = re.fullmatch(pattern, name)
        if match:
            first, *rest = (*match.groups(), "0")
            return path.format(int(first) + offset, *rest)
    raise AssertionError(name)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["GN_PRACTICAL", "GN_EXACT"])
def test_panoptic_fpn_has_detectron2s_counts(depth, norm):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    compare(
        panoptic_fpn_resnet(depth=depth, norm=norm),
        "pfpn_gnp_full.yaml",
        depth,
        norm,
        "MODEL.SEM_SEG_HEAD.NORM",
        norm,
        "MODEL.ROI_MASK_HEAD.NORM",
        norm,
    )


def test_faster_rcnn_has_detectron2s_counts():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    model = fasterrcnn_resnet_fpn(weight_standardization=True)
    other = compare(model, "faster_rcnn_gnp_ws.yaml", 50, "GN_PRACTICAL")
    standardized = [sum(isinstance(m, WSConv2d) for m in each.modules()) for each in (model, other)]
    assert standardized[0] == standardized[1] == 53 + 8 + 4


def compare(model, config, depth, norm, *opts):
    from pathlib import Path

    from detectron2.modeling import build_model

    from gnpractical.d2 import load_config

    file = Path(__file__).parents[2] / "configs" / config
    options = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", str(depth)]
    for section in ("RESNETS", "FPN", "ROI_BOX_HEAD"):
        options += [f"MODEL.{section}.NORM", norm]
    if depth < 50:
        options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    other = build_model(load_config(str(file), [*options, *opts]))
    mine = {detectron2_name(name): row for name, row in counts(model).items()}
    assert mine == counts(other)
    return other


def test_weight_standardization_is_of_backbone_fpn_and_box_head():
    model = panoptic_fpn_resnet(depth=18, weight_standardization=True)
    parts = {
        ".".join(n.split(".")[:2]) for n, m in model.named_modules() if isinstance(m, WSConv2d)
    }
    assert parts == {"backbone.body", "backbone.fpn", "roi_heads.box_head"}


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("GN_1", nn.GroupNorm),
        ("GN", nn.GroupNorm),
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("FrozenBN", torchvision.ops.FrozenBatchNorm2d),
    ],
)
def test_norm_names_mean_what_they_mean_in_detectron2(norm, kind):
    model = fasterrcnn_resnet_fpn(depth=18, norm=norm, num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, kind)]
    assert len(norms) == 20 + 8 + 4
    if kind is nn.GroupNorm:
        assert {m.num_groups for m in norms} == {1 if norm == "GN_1" else 32}


def test_unknown_names_and_numbers():
    with pytest.raises(ValueError, match="Unknown norm 'GN_PRACTICL'.*Did you mean 'GN_PRACTICAL'"):
        norm_layer("GN_PRACTICL")
    for bad in [None, 32, "", ["GN"]]:
        with pytest.raises(ValueError, match="Unknown norm"):
            norm_layer(bad)
    with pytest.raises(ValueError, match="--model must be one of panoptic_fpn_resnet, fast"):
        run.build(run.RunOptions(output_dir="", model="foo"), 4, 4)
    with pytest.raises(ValueError, match=r"depth must be one of \(18, 34, 50, 101\), got 19"):
        fasterrcnn_resnet_fpn(depth=19)
    with pytest.raises(ValueError, match="stages must be 1 to 4"):
        fasterrcnn_resnet_fpn(stages=0)
    with pytest.raises(ValueError, match="GN_48 at .*64"):
        fasterrcnn_resnet_fpn(depth=18, norm="GN_48")
    with pytest.raises(ValueError, match="num_classes counts the background"):
        fasterrcnn_resnet_fpn(num_classes=1)
    with pytest.raises(ValueError, match="num_stuff must be below 255"):
        panoptic_fpn_resnet(num_stuff=255)
    with pytest.raises(ValueError, match="mask_convs must be at least 0, got -2"):
        panoptic_fpn_resnet(mask_convs=-2)
    with pytest.raises(TypeError, match="num_things and num_stuff instead of num_classes"):
        panoptic_fpn_resnet(num_classes=4)
    with pytest.raises(TypeError):
        fasterrcnn_resnet_fpn(18)
    for build in (fasterrcnn_resnet_fpn, panoptic_fpn_resnet):
        with pytest.raises(TypeError, match="'weight_standardisation'"):
            build(weight_standardisation=True)
        with pytest.raises(
            ValueError, match="weight_standardization must be True or False, got 'no'"
        ):
            build(depth=18, weight_standardization="no")
        with pytest.raises(ValueError, match="box_convs must be at least 0, got -1"):
            build(depth=18, box_convs=-1)
        with pytest.raises(TypeError, match="unknown argument 'min_sise'; did you mean 'min_size'"):
            build(min_sise=3)


@pytest.mark.parametrize("stages", [2, 4])
def test_faster_rcnn_trains_and_predicts(stages):
    model = fasterrcnn_resnet_fpn(depth=18, num_classes=3, stages=stages, channels=16, min_size=64)
    losses = model(IMAGES, TARGETS)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    result = model.eval()(IMAGES)
    assert len(result) == 2 and result[0].keys() == {"boxes", "labels", "scores"}
