"""Detectron2's ResNet backbones for GroupNorm in every layer, depths 18 to 152."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from gnpractical.d2.norm import is_group_norm


@BACKBONE_REGISTRY.register()
def build_gnp_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``build_resnet_backbone``, for a GroupNorm in ``MODEL.RESNETS.NORM``.

    Raises:
        ValueError: The key names another norm, such as its default, FrozenBN.
    """
    _require_group_norm(cfg, "RESNETS")
    return build_resnet_backbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_gnp_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """``build_resnet_fpn_backbone``, for GroupNorms in ``MODEL.RESNETS.NORM`` and ``FPN.NORM``.

    Other than there, ``MODEL.FPN.IN_FEATURES`` may end before res5: the level that is pooled from
    the last one moves with it.

    Raises:
        ValueError: One of the keys names another norm.
    """
    _require_group_norm(cfg, "RESNETS", "FPN")
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


def _require_group_norm(cfg: CfgNode, *sections: str) -> None:
    # The config is taken at its word, so that the config.yaml of a run describes its model.
    for section in sections:
        norm = cfg.MODEL[section].NORM
        if not is_group_norm(norm):
            raise ValueError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} needs a GroupNorm in "
                f"MODEL.{section}.NORM, got {norm!r}: set MODEL.{section}.NORM GN_PRACTICAL"
            )
