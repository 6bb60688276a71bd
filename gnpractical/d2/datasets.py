"""Registers gnp_shapes_train and gnp_shapes_val; the images are made on first use."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic

from gnpractical.datasets import shapes
from gnpractical.datasets.coco_files import datasets_root, split_files


def register_shapes(root: str) -> None:
    """Register both splits under ``root``, in the form Panoptic FPN trains on.

    As with COCO's "separated" form, the semantic branch has one class for all things.
    """
    folder = os.path.join(root, shapes.FOLDER)
    for split in shapes.NUM_IMAGES:
        name = f"gnp_shapes_{split}"
        metadata = _metadata(folder, split)

        def load(name: str = name, metadata: dict[str, Any] = metadata) -> list[dict]:
            shapes.make_shapes(root)
            return merge_to_panoptic(
                load_coco_json(metadata["json_file"], metadata["image_root"], name),
                load_sem_seg(metadata["sem_seg_root"], metadata["image_root"]),
            )

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


def _metadata(folder: str, split: str) -> dict[str, Any]:
    thing_ids = [c["id"] for c in shapes.CATEGORIES if c["isthing"]]
    stuff_ids = [c["id"] for c in shapes.CATEGORIES if not c["isthing"]]
    return split_files(folder, split) | {
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": 255,
        "thing_classes": list(shapes.THINGS),
        "stuff_classes": ["things", *shapes.STUFF],
        "thing_dataset_id_to_contiguous_id": {id: i for i, id in enumerate(thing_ids)},
        "stuff_dataset_id_to_contiguous_id": {0: 0} | {id: i + 1 for i, id in enumerate(stuff_ids)},
    }


register_shapes(datasets_root())
