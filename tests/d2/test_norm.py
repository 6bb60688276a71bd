import pickle
import subprocess
import sys
import types

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.layers
import detectron2.layers.batch_norm
import detectron2.modeling.backbone.resnet as resnet_module
import torch
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

import gnpractical.d2
from gnpractical.d2.norm import DETECTRON2_NORM_NAMES
from gnpractical.datasets.panoptic import rgb_to_id
from gnpractical.layers import PracticalGroupNorm, find_pairs
from gnpractical.layers.pairing import layer_widths, require_resolved
from gnpractical.num_groups import practical_num_groups


def zoo_model(name, **norms):
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(name)
    return build(cfg, **norms)


def build(cfg, **norms):
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    for section in norms or dict.fromkeys(
        ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"],
        "GN_PRACTICAL",
    ):
        cfg.MODEL[section].NORM = norms.get(section, "GN_PRACTICAL")
    return build_model(cfg)


def assert_all_resolved_from_their_own_layer(model, count):
    require_resolved(model)
    pairs = [p for p in find_pairs(model) if isinstance(p.norm, PracticalGroupNorm)]
    assert len(pairs) == count
    for pair in pairs:
        (layer,) = pair.layers.values()
        in_channels, out_channels = layer_widths(layer)
        assert pair.norm.in_channels == in_channels, pair.norm_name
        assert pair.norm.num_groups == practical_num_groups(in_channels, out_channels)
    return pairs


@pytest.mark.parametrize(
    "config, count",
    [
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", 72),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", 53),
        ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", 53),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", 61),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", 67),
        ("Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml", 69),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", 65),
        ("Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml", 65),
        ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", 112),
    ],
)
def test_every_norm_of_the_model_zoo_by_override_alone(config, count):
    assert_all_resolved_from_their_own_layer(zoo_model(config), count)


def test_resnet_50_has_the_papers_counts():
    model = zoo_model("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", RESNETS="GN_PRACTICAL")
    groups = [(p.norm.num_groups, p.norm.num_channels) for p in find_pairs(model)]
    assert sum(g == 1 for g, _ in groups) == 38
    assert sum(g == c for g, c in groups) == 12
    assert sum(g not in (1, c) for g, c in groups) == 3


def test_fpn_and_semantic_branch_counts():
    model = zoo_model("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    groups = {p.norm_name: p.norm.num_groups for p in find_pairs(model)}
    assert [groups[f"backbone.fpn_lateral{i}.norm"] for i in (2, 3, 4, 5)] == [1, 64, 256, 256]
    assert [groups[f"backbone.fpn_output{i}.norm"] for i in (2, 3, 4, 5)] == [1] * 4
    assert groups["sem_seg_head.p5.0.norm"] == 32 and groups["sem_seg_head.p5.2.norm"] == 1


@pytest.mark.parametrize("name", ["GN_PRACTICAL", "GN_64"])
def test_retinanets_throwaway_norm_is_no_error(name):
    # RetinaNetHead asks for get_norm(norm, 32) to look at its type; 64 does not divide 32.
    model = zoo_model("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RETINANET=name)
    assert sum(isinstance(p.norm, PracticalGroupNorm) for p in find_pairs(model)) == 8


def test_lazy_config_regnet():
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    net = LazyCall(RegNet)(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=6,
        w_a=36.0,
        w_0=48,
        w_m=2.5,
        group_width=8,
        norm="GN_PRACTICAL",
        out_features=["s2"],
    )
    assert_all_resolved_from_their_own_layer(instantiate(net), count=1 + 6 * 3 + 3)


def test_lazy_config_vit_pyramid():
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

    class PlainViT(Backbone):  # only its shape matters here; Detectron2's ViT needs timm
        def output_shape(self):
            return {"last_feat": ShapeSpec(channels=96, stride=16)}

        def forward(self, x):
            raise NotImplementedError

    pyramid = SimpleFeaturePyramid(
        PlainViT(), "last_feat", 32, scale_factors=(4.0, 2.0, 1.0, 0.5), norm="GN_PRACTICAL"
    )
    assert_all_resolved_from_their_own_layer(pyramid, count=9)


def test_bundled_projects(monkeypatch):
    # Of Panoptic-DeepLab and PointRend, only the data mappers use these two.
    stub = types.SimpleNamespace(rgb2id=rgb_to_id)
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    monkeypatch.setitem(sys.modules, "panopticapi", types.SimpleNamespace(utils=stub))
    monkeypatch.setitem(sys.modules, "panopticapi.utils", stub)
    from detectron2.projects import deeplab, panoptic_deeplab, point_rend

    cfg = get_cfg()
    deeplab.add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3PlusHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [48]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 64
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 64
    model = build(cfg, RESNETS="GN_PRACTICAL", SEM_SEG_HEAD="GN_PRACTICAL")
    # a stem of three convolutions; ASPP 5, low-level projection 1, fusion 2
    assert_all_resolved_from_their_own_layer(model, 55 + 8)
    x = torch.randn(1, 3, 64, 64)
    model.sem_seg_head.layers(model.train().backbone(x)).sum().backward()

    cfg = get_cfg()
    panoptic_deeplab.add_panoptic_deeplab_config(cfg)
    cfg.DATASETS.TRAIN = ("gnp_shapes_train",)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    for head in (cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.INS_EMBED_HEAD):
        head.IN_FEATURES = ["res2", "res3", "res5"]
        head.PROJECT_FEATURES = ["res2", "res3"]
        head.PROJECT_CHANNELS = [32, 64]
        head.ASPP_CHANNELS, head.CONVS_DIM = 64, 64
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PanopticDeepLabSemSegHead"
    cfg.MODEL.SEM_SEG_HEAD.HEAD_CHANNELS = 64
    cfg.MODEL.INS_EMBED_HEAD.NAME = "PanopticDeepLabInsEmbedHead"
    model = build(
        cfg, RESNETS="GN_PRACTICAL", SEM_SEG_HEAD="GN_PRACTICAL", INS_EMBED_HEAD="GN_PRACTICAL"
    )
    require_resolved(model)
    assert sum(isinstance(p.norm, PracticalGroupNorm) for p in find_pairs(model)) > 53 + 12

    cfg = get_cfg()
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    model = build(cfg, RESNETS="GN_PRACTICAL", FPN="GN_PRACTICAL", SEM_SEG_HEAD="GN_PRACTICAL")
    assert_all_resolved_from_their_own_layer(model, 53 + 8 + 7)


def test_detectron2s_own_names_behave_as_before():
    original = get_norm.__wrapped__
    for name in DETECTRON2_NORM_NAMES:
        ours, theirs = get_norm(name, 64), original(name, 64)
        assert type(ours) is type(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
    assert get_norm("", 64) is None and get_norm(None, 64) is None
    assert get_norm(lambda channels: nn.GroupNorm(2, channels), 64).num_groups == 2
    assert type(get_norm("GN", 64)) is nn.GroupNorm and get_norm("GN", 64).num_groups == 32
    assert isinstance(get_norm("FrozenBN", 4), FrozenBatchNorm2d)


def test_reaches_every_module_that_holds_get_norm():
    assert resnet_module.get_norm is detectron2.layers.get_norm is get_norm
    assert isinstance(resnet_module.get_norm("GN_4", 8), PracticalGroupNorm)
    assert get_norm is not get_norm.__wrapped__
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).values()
        assert not any(value is get_norm.__wrapped__ for value in held), module
    assert pickle.loads(pickle.dumps(get_norm)) is get_norm


@pytest.mark.slow
def test_import_order_does_not_matter():
    script = (
        "from detectron2.layers import get_norm as early\n"
        "import gnpractical.d2, gnpractical.d2.norm\n"
        "from detectron2.modeling.backbone.fpn import get_norm as late\n"
        "assert early('GN_PRACTICAL', 8).rule == late('GN_PRACTICAL', 8).rule == 'practical'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_unknown_name_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(ValueError) as e:
        get_norm("GN_PRATICAL", 64)
    for part in ["'GN_PRATICAL'", "'GN_PRACTICAL'", "GN_CLOSEST", "FrozenBN", "MODEL.RESNETS.NORM"]:
        assert part in str(e.value)
    with pytest.raises(ValueError, match="Did you mean 'GN_CLOSEST'"):
        get_norm("gn_closest", 8)


def test_count_that_does_not_divide_names_layer_numbers_and_divisors():
    with pytest.raises(ValueError, match=r"Conv2d\(3, 64\): 48 groups.*64 channels.*1, 2, 4, 8"):
        zoo_model("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", RESNETS="GN_48")


def test_optimizer_treats_them_as_norms():
    from detectron2.solver import build_optimizer

    cfg = get_cfg()
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.25
    model = nn.Sequential(nn.Conv2d(4, 8, 1), get_norm("GN_PRACTICAL", 8))
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    assert decays[id(model[1].weight)] == 0.25 and decays[id(model[0].weight)] != 0.25


def test_callable_norms_of_lazy_configs():
    from detectron2.modeling.backbone.resnet import BasicStem

    stem = BasicStem(norm=lambda channels: get_norm("GN_PRACTICAL", channels))
    assert (stem.conv1.norm.in_channels, stem.conv1.norm.num_groups) == (3, 1)
    assert gnpractical.d2.add_gnp_config


def test_a_norm_key_of_which_nothing_comes_is_warned_of(caplog):
    """As heads of other projects do, one of these asks for "GN" only, and one calls get_norm."""

    @META_ARCH_REGISTRY.register()
    class Foreign(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.odd = nn.GroupNorm(2, 8) if cfg.MODEL.ODD.NORM == "GN" else None
            self.good = get_norm(cfg.MODEL.GOOD.NORM, 8)

    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "Foreign"
    for part in ("ODD", "GOOD"):
        cfg.MODEL[part] = CfgNode({"NORM": "GN_PRACTICAL"})
    try:
        model = build_model(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("Foreign")
    assert model.good.num_groups == 1 and model.odd is None
    assert "No norm was built for MODEL.ODD.NORM GN_PRACTICAL:" in caplog.text
    assert type(cfg.MODEL.ODD.NORM) is str
