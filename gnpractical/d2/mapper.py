"""A dataset mapper that refuses pictures which Detectron2's would read wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from PIL import Image

from gnpractical.datasets.image_files import check_depth, check_is_file, check_size
from gnpractical.datasets.panoptic import check_labels


class CheckedMapper:
    """Raises ValueError for pictures that Detectron2 reads wrongly, or a model cannot train on.

    These are pictures of 16 bits, and semantic PNGs of another size than their image, with a label
    that the model does not have, or in training without any. Images of another size than
    the annotations say Detectron2 refuses itself.

    Args:
        cfg: The config.
        is_train: Whether it maps for training.
        mapper: What reads the pictures; by default Detectron2's mapper by ``cfg``.
    """

    def __init__(
        self, cfg: CfgNode, is_train: bool = True, mapper: Callable[[dict], Any] | None = None
    ) -> None:
        self.is_train = is_train
        self.mapper = mapper or DatasetMapper(cfg, is_train=is_train)
        head, architecture = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.META_ARCHITECTURE
        self._labels = None
        if architecture in ("PanopticFPN", "SemanticSegmentor"):
            self._labels = head.NUM_CLASSES, head.IGNORE_VALUE

    def __call__(self, dataset_dict: dict) -> Any:
        check_is_file(dataset_dict["file_name"])
        with Image.open(dataset_dict["file_name"]) as image:  # which reads no pixels
            check_depth(image, dataset_dict["file_name"])
        if "sem_seg_file_name" in dataset_dict:
            path = dataset_dict["sem_seg_file_name"]
            with Image.open(path) as labels:
                check_depth(labels, path)
                if {"width", "height"} <= dataset_dict.keys():
                    check_size(labels, path, dataset_dict)
                if self._labels:
                    classes, ignored = self._labels
                    check_labels(labels, path, classes, training=self.is_train, ignored=ignored)
        try:
            return self.mapper(dataset_dict)
        except OSError as e:  # Pillow's, which does not say where
            raise ValueError(f"{dataset_dict['file_name']}: not a readable image ({e})") from e
