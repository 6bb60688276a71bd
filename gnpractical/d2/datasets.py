"""Registers gnp_shapes_train and gnp_shapes_val; the images are made on first use."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from gnpractical.d2.own_data import load_records, metadata_of
from gnpractical.datasets import shapes
from gnpractical.datasets.coco_files import datasets_root, split_files


def register_shapes(root: str) -> None:
    """Register both splits under ``root``, in the form Panoptic FPN trains on."""
    things = [c for c in shapes.CATEGORIES if c["isthing"]]
    for split in shapes.NUM_IMAGES:
        name = f"gnp_shapes_{split}"
        files = split_files(os.path.join(root, shapes.FOLDER), split)

        def load(name: str = name, files: dict[str, str] = files) -> list[dict]:
            shapes.make_shapes(root)
            return load_records(name, files)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**files, **metadata_of(things, shapes.CATEGORIES))


register_shapes(datasets_root())
