"""Overrides that let the configs in configs/lazy train in seconds on gnp_shapes."""

_TRAINING = """
train.device=cpu train.amp.enabled=false train.max_iter=10 train.checkpointer.period=4
train.eval_period=0 train.seed=1
dataloader.train.dataset.names=gnp_shapes_train dataloader.test.dataset.names=gnp_shapes_val
dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 dataloader.test.num_workers=0
dataloader.test.mapper.augmentations.0.short_edge_length=64 optimizer.lr=0.001
"""
_WIDTHS = """
optimizer.momentum=0 model.backbone.out_channels=16
model.proposal_generator.head.in_channels=16
model.roi_heads.num_classes=4 model.roi_heads.batch_size_per_image=32
model.roi_heads.box_head.input_shape.channels=16 model.roi_heads.box_head.conv_dims=[16]
model.roi_heads.box_head.fc_dims=[32] model.roi_heads.box_predictor.input_shape.channels=32
model.roi_heads.mask_head.input_shape.channels=16 model.roi_heads.mask_head.conv_dims=[16,16]
"""
_PARTS = {
    "mask_rcnn_gnp_100ep_LSJ": """
dataloader.train.mapper.augmentations.0.target_height=64
dataloader.train.mapper.augmentations.0.target_width=64
dataloader.train.mapper.augmentations.1.crop_size=[64,64]
""",
    "pfpn_gnp_full": """
dataloader.train.mapper.augmentations.0.short_edge_length=64
model.sem_seg_head.num_classes=5 model.sem_seg_head.conv_dims=16
""",
}
TINY = {name: (_TRAINING + _WIDTHS + part).split() for name, part in _PARTS.items()}
# The keys of every norm in them.
NORMS = [
    "model.backbone.bottom_up.stem.norm",
    "model.backbone.bottom_up.stages.norm",
    "model.backbone.norm",
    "model.roi_heads.box_head.conv_norm",
    "model.roi_heads.mask_head.conv_norm",
]
