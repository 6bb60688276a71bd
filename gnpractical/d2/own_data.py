"""One's own data in COCO's form, registered by the name that a config gives it.

``coco:<json>:<folder>`` are instances and the folder of their images, ``coco_panoptic:<folder>:
<split>`` a split of a folder in COCO's layout. Numbers of classes come from the JSON.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from gnpractical.datasets.coco_files import check_files, split_files, split_name
from gnpractical.datasets.panoptic import IGNORE_LABEL, Json, read_json, semantic_labels

_INSTANCES, _PANOPTIC = "coco:", "coco_panoptic:"


def register_own(cfg: CfgNode, *splits: str) -> list[str]:
    """Register, in this process, the data sets of ``cfg`` that say where their files are.

    Args:
        splits: "TRAIN" and "TEST", keys of ``cfg.DATASETS``.

    Returns:
        Their names.

    Raises:
        ValueError: Their files are missing, or have no categories. The message names them.
    """
    names = [name for split in splits for name in cfg.DATASETS[split]]
    names = [name for name in names if name.startswith((_INSTANCES, _PANOPTIC))]
    for name in names:
        if name in DatasetCatalog:
            continue
        kind, _, rest = name.partition(":")
        first, colon, second = rest.rpartition(":")
        if not colon:
            form = "<folder>:<split>" if kind == "coco_panoptic" else "<json>:<image folder>"
            raise ValueError(f"Data set {name!r}: its name must be {kind}:{form}")
        if kind == "coco_panoptic":
            files = split_files(first, second)
        else:
            files = {"json_file": first, "image_root": second}
        check_files(name, files)
        _register(name, files)
    return names


def folder_overrides(folder: str, *, panoptic: bool) -> list[str]:
    """Config overrides that take the splits "train" and "val" of a folder in COCO's layout."""
    names = {}
    for key, split in (("TRAIN", "train"), ("TEST", "val")):
        files = split_files(folder, split_name(folder, split))
        names[key] = f"{_INSTANCES}{files['json_file']}:{files['image_root']}"
        if panoptic:
            names[key] = f"{_PANOPTIC}{folder}:{split_name(folder, split)}"
    return [word for key, name in names.items() for word in (f"DATASETS.{key}", repr((name,)))]


def _register(name: str, files: dict[str, str]) -> None:
    data = read_json(files["json_file"])
    panoptic = read_json(files["panoptic_json"]) if "panoptic_json" in files else {}
    try:
        metadata = metadata_of(data["categories"], panoptic.get("categories", ()))
        has_rle = any(isinstance(a.get("segmentation"), dict) for a in data.get("annotations", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{' or '.join(path for path in files.values() if path.endswith('json'))} is not of "
            f"COCO's form: {type(e).__name__}: {e}"
        ) from None
    DatasetCatalog.register(name, lambda: load_records(name, files))
    MetadataCatalog.get(name).set(**files, **metadata, has_rle=has_rle)


def metadata_of(instances: Sequence[Json], panoptic: Sequence[Json] = ()) -> dict[str, Any]:
    """Detectron2's metadata of the categories of an instances JSON, and of a panoptic JSON if any.

    As with COCO's "separated" form, the semantic branch has one class for all things.
    """
    things = {c["id"]: c["name"] for c in sorted(instances, key=lambda c: c["id"])}
    metadata = {
        "evaluator_type": "coco",
        "thing_classes": list(things.values()),
        "thing_dataset_id_to_contiguous_id": {id: i for i, id in enumerate(things)},
    }
    names = {c["id"]: c["name"] for c in panoptic}
    if not names:
        return metadata
    stuff = {id: label for id, label in semantic_labels(panoptic).items() if label}
    return metadata | {
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "stuff_classes": ["things", *(names[id] for id in stuff)],
        # That of all things together is 0 in Detectron2, too, unless a stuff category has it.
        "stuff_dataset_id_to_contiguous_id": {-1 if 0 in stuff else 0: 0} | stuff,
    }


def load_records(name: str, files: dict[str, str]) -> list[dict]:
    """Detectron2's records of a data set's images, with semantic labels if it has any."""
    records = load_coco_json(files["json_file"], files["image_root"], name)
    if "panoptic_json" in files:
        annotations = read_json(files["panoptic_json"])["annotations"]
        pngs = {a["image_id"]: a["file_name"] for a in annotations}
        lacking = [r["image_id"] for r in records if r["image_id"] not in pngs]
        if lacking:
            raise ValueError(
                f"{files['panoptic_json']} and {files['json_file']} must be of the same images; "
                f"{len(lacking)} have no panoptic annotation, first id {lacking[0]}"
            )
        for record in records:
            png = pngs[record["image_id"]]
            record["sem_seg_file_name"] = os.path.join(files["sem_seg_root"], png)
    return records


def use_own_data(cfg: CfgNode, *splits: str) -> None:
    """Register the data sets of ``cfg`` that say where their files are, and set its numbers of
    classes, and for masks that are no polygons INPUT.MASK_FORMAT, to what they have.

    Args:
        splits: As of :func:`register_own`.

    Raises:
        ValueError: As :func:`register_own`, or the data sets' classes differ.
    """
    own = register_own(cfg, *splits)
    if not own:
        return
    metadata = MetadataCatalog.get(own[0])
    for name in own[1:]:
        other = MetadataCatalog.get(name)
        for kind in ("thing_classes", "stuff_classes"):
            if metadata.get(kind) != other.get(kind):
                raise ValueError(
                    f"{own[0]} and {name} must have the same classes, not {metadata.get(kind)} "
                    f"and {other.get(kind)}"
                )
    changes: dict[str, Any] = {}
    things, stuff = len(metadata.thing_classes), len(metadata.get("stuff_classes", []))
    changes["MODEL.ROI_HEADS.NUM_CLASSES"] = changes["MODEL.RETINANET.NUM_CLASSES"] = things
    if stuff:
        changes["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = stuff
    if any(MetadataCatalog.get(name).has_rle for name in own):
        changes["INPUT.MASK_FORMAT"] = "bitmask"
    for key, value in changes.items():
        cfg.merge_from_list([key, value])
    print(f"From {own[0]}: {', '.join(f'{key} {value}' for key, value in changes.items())}")
