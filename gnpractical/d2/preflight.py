"""What can be found wrong with a config's data sets before training starts."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from gnpractical.datasets.coco_files import (
    ROOT_VARIABLE,
    check_annotations,
    check_files,
    datasets_root,
)
from gnpractical.datasets.shapes import make_shapes

_INSTANCES = ("image_root", "json_file")
_PANOPTIC = ("panoptic_json", "panoptic_root", "sem_seg_root")


def check_datasets(cfg: CfgNode, *splits: str) -> None:
    """Raise ValueError unless the data sets are registered, complete and sound.

    The message names what was looked for and where, and the command that makes it.

    Args:
        splits: "TRAIN" and "TEST", keys of ``cfg.DATASETS``; the first must name a data set.
    """
    if not cfg.DATASETS[splits[0]]:
        raise ValueError(f"DATASETS.{splits[0]} must name a data set, but is empty")
    default = "" if ROOT_VARIABLE in os.environ else "the default of "
    for name in itertools.chain(*(cfg.DATASETS[split] for split in splits)):
        if name not in DatasetCatalog:
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Data set {name!r} is not registered.{hint}")
        metadata = MetadataCatalog.get(name)
        if name.startswith("gnp_shapes_"):  # made on first use
            make_shapes(Path(metadata.image_root).parents[1])
        files = {key: metadata.get(key) for key in (*_INSTANCES, *_PANOPTIC) if metadata.get(key)}
        check_files(name, files, datasets_root(), f"{default}${ROOT_VARIABLE}")
        training = name in cfg.DATASETS.TRAIN
        panoptic = cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
        if panoptic and training and not metadata.get("sem_seg_root"):
            raise ValueError(
                f"Data set {name} has no semantic labels, which PanopticFPN is trained on. Of your "
                f"own data take coco_panoptic:<folder>:<split>, or MODEL.META_ARCHITECTURE "
                f"GeneralizedRCNN"
            )
        if not cfg.MODEL.GNP.CHECK_ANNOTATIONS:
            continue
        # LVIS's files are not quite of COCO's form, and two of COCO 2014's have known duplicates.
        is_coco = metadata.get("evaluator_type") in ("coco", "coco_panoptic_seg")
        if not is_coco or "2014_" in name:
            files.pop("json_file", None)
        things = len(metadata.get("thing_classes", ()))
        has_roi_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
        if has_roi_heads and things > cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f"Data set {name} has {things} classes: set MODEL.ROI_HEADS.NUM_CLASSES {things}, "
                f"not {cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
            )
        stuff = len(metadata.get("stuff_classes", ()))
        head = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if panoptic and stuff and stuff != head:
            raise ValueError(
                f"Data set {name} has {stuff} classes of stuff, its things together being one: set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {stuff}, not {head}"
            )
        remedy = "set MODEL.GNP.CHECK_ANNOTATIONS False"
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        needed = ["segmentation"] if cfg.MODEL.MASK_ON else []
        if "TEST" in splits and name in cfg.DATASETS.TEST:  # by pycocotools, which asks for them
            needed += ["area", "iscrowd"]
        check_annotations(name, files, remedy, training=training, things=ids, needed=needed)
