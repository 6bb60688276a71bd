"""Detectron2's ResNet backbones with ``MODEL.GNP.NORM`` in every layer, depths 18 to 152."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


@BACKBONE_REGISTRY.register()
def build_gnp_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``build_resnet_backbone`` with the norm ``MODEL.GNP.NORM``."""
    return build_resnet_backbone(_with_gnp_norm(cfg), input_shape)


@BACKBONE_REGISTRY.register()
def build_gnp_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``build_resnet_fpn_backbone`` with the norm ``MODEL.GNP.NORM``, in the FPN too.

    ``MODEL.FPN.IN_FEATURES`` may end before res5; the level pooled from the last one moves with it.
    """
    cfg = _with_gnp_norm(cfg)
    top_block = LastLevelMaxPool()  # it expects p5; the levels are named after the stages
    top_block.in_feature = cfg.MODEL.FPN.IN_FEATURES[-1].replace("res", "p")
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _with_gnp_norm(cfg: CfgNode) -> CfgNode:
    if "GNP" not in cfg.MODEL:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} needs the MODEL.GNP keys: call "
            f"gnpractical.d2.add_gnp_config(cfg) before the config file is merged."
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = cfg.MODEL.GNP.NORM
    # GroupNorm backbones, ours and Detectron2's model zoo's, stride in the 3x3 convolution.
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    if cfg.MODEL.RESNETS.DEPTH in (18, 34):
        # The one width Detectron2 allows there; its default is that of the deeper ones.
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return cfg
