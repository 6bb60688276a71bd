"""Detectron2's Mask R-CNN R-50 FPN from scratch, 100 epochs, with GroupNorm where it has SyncBN."""

from detectron2 import model_zoo

from .common import gnp  # noqa: F401 (a part of the config)

_base = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, dataloader, train = _base.model, _base.dataloader, _base.train
optimizer, lr_multiplier = _base.optimizer, _base.lr_multiplier

NORM = "GN_PRACTICAL"
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = NORM
model.backbone.norm = NORM
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = NORM

dataloader.evaluator = None  # that of the data set's kind, with a picture of predictions
train.output_dir = "output/mask_rcnn_gnp_100ep_LSJ"
train.ddp.fp16_compression = False  # this trainer has none
