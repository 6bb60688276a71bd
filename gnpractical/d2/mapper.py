"""Detectron2's dataset mapper, which refuses pictures that it would read wrongly."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from PIL import Image

from gnpractical.datasets.panoptic import check_depth, check_size


class CheckedMapper(DatasetMapper):
    """Raises ValueError for pictures of 16 bits, and for semantic PNGs of another size than theirs.

    Images of another size than the annotations say Detectron2 refuses itself.
    """

    def __call__(self, dataset_dict: dict) -> Any:
        with Image.open(dataset_dict["file_name"]) as image:  # which reads no pixels
            check_depth(image, dataset_dict["file_name"])
        if "sem_seg_file_name" in dataset_dict:
            path = dataset_dict["sem_seg_file_name"]
            with Image.open(path) as labels:
                check_depth(labels, path)
                if {"width", "height"} <= dataset_dict.keys():
                    check_size(labels, path, dataset_dict)
        return super().__call__(dataset_dict)
