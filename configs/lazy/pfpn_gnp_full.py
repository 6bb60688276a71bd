"""Panoptic FPN R-50 with GroupNorm in every part, from scratch: ``configs/pfpn_gnp_full.yaml``."""

from detectron2 import model_zoo

from .common import gnp  # noqa: F401 (a part of the config)

model = model_zoo.get_config("common/models/panoptic_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train = model_zoo.get_config("common/train.py").train

NORM = "GN_PRACTICAL"
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = NORM
model.backbone.norm = model.sem_seg_head.norm = NORM
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = NORM

model.backbone.bottom_up.freeze_at = 0  # nothing is pretrained
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.pixel_std = [57.375, 57.12, 58.395]  # ImageNet's, in BGR
# "4conv1fc", the head of the published GroupNorm detectors
model.roi_heads.box_head.conv_dims = [256] * 4
model.roi_heads.box_head.fc_dims = [1024]

dataloader.evaluator = None  # that of the data set's kind, with a picture of predictions
train.output_dir = "output/pfpn_gnp_full"
train.max_iter = 270000
