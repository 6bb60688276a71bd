"""The models and the recipe of ``configs/quick``: small, for the embedded shapes, in minutes."""

from typing import Any

from torchvision.models.detection.anchor_utils import AnchorGenerator

# Options of tools/train_torchvision.py.
OPTIONS = {
    "dataset": "gnp_shapes",
    "depth": 18,
    "min_size": [120],
    "iterations": 1000,
    "batch_size": 2,
    "lr": 0.03,
    "warmup": 100,
    "clip_grad_norm": 10.0,
    "checkpoint_period": 250,
    "workers": 0,
    "seed": 1,
}


def faster_rcnn() -> dict[str, Any]:
    """Arguments of the builder."""
    anchors = AnchorGenerator(((10,), (20,), (40,), (80,)), ((0.5, 1.0, 2.0),) * 4)
    return {
        "stages": 3,
        "channels": 64,
        "fc_channels": 256,
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": 500,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_train": 200,
        "rpn_post_nms_top_n_test": 100,
        "box_batch_size_per_image": 64,
        "box_positive_fraction": 0.5,
    }


def panoptic_fpn() -> dict[str, Any]:
    """Arguments of the builder."""
    more = {"box_convs": 2, "mask_convs": 1, "semantic_channels": 64, "min_stuff_area": 64}
    return faster_rcnn() | more
