"""Where the files of a split lie, in COCO's layout, and whether they are there and sound."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gnpractical.datasets.annotations import check_instances, check_panoptic
from gnpractical.datasets.image_files import read_image
from gnpractical.datasets.panoptic import (
    Json,
    panoptic_to_semantic,
    read_ids,
    read_json,
    semantic_labels,
)

logger = logging.getLogger(__name__)

CHECKED_PNGS = 20
MAX_OTHER = 0.1  # the share of images whose two annotations may disagree
_AS_SCORED = "To be scored it must be given:"
_NEEDED = {
    "area": f"{_AS_SCORED} in pixels, that of the box where there is no mask",
    "iscrowd": f"{_AS_SCORED} 0, or 1 for a crowd",
    "segmentation": "A model with masks needs it; take one without, or MODEL.MASK_ON False",
}
ROOT_VARIABLE = "DETECTRON2_DATASETS"


def datasets_root() -> str:
    """Where data sets are looked for, as by Detectron2: ``$DETECTRON2_DATASETS``, ``datasets``."""
    return os.path.expanduser(os.getenv(ROOT_VARIABLE, "datasets"))


def split_name(folder: str, split: str) -> str:
    """What the split "train" or "val" is called in ``folder``: with a year where COCO's are."""
    of_coco = os.path.join(folder, "annotations", "instances_train2017.json")
    return f"{split}2017" if os.path.exists(of_coco) else split


def split_files(folder: str, split: str) -> dict[str, str]:
    """The paths of a split of the data set in ``folder``, named as Detectron2's metadata are."""
    return {
        "image_root": os.path.join(folder, split),
        "json_file": os.path.join(folder, "annotations", f"instances_{split}.json"),
        "panoptic_json": os.path.join(folder, "annotations", f"panoptic_{split}.json"),
        "panoptic_root": os.path.join(folder, f"panoptic_{split}"),
        "sem_seg_root": os.path.join(folder, f"panoptic_stuff_{split}"),
    }


def check_files(name: str, files: Mapping[str, str], root: str = "", source: str = "") -> None:
    """Raise ValueError for one of a data set's ``split_files`` that does not exist.

    ``root`` is where data sets are looked for, if the name does not say it, and ``source`` is the
    option that says so.
    """
    for key, path in files.items():
        if not os.path.exists(path):
            where = f". Data sets are looked for in {root!r} ({source})" if root else ""
            layout = "; it must hold the data set's folder, in COCO's layout" if root else ""
            remedy = _remedy(path) if key == "sem_seg_root" else layout
            raise ValueError(f"Data set {name}: {key} {path!r} does not exist{where}{remedy}.")


def check_annotations(
    name: str,
    files: Mapping[str, str],
    remedy: str,
    *,
    training: bool = True,
    things: Container[int] | None = None,
    needed: Collection[str] = (),
) -> None:
    """Raise ValueError for annotations that would train wrongly; log the harmless problems.

    Args:
        remedy: tells the user how to train on them all the same.
        training: whether there must be annotations, which COCO's test sets do not have.
        things: ids of the categories that a model takes for things, if they are known.
        needed: what every instance must have that may be left out otherwise: "area", "iscrowd" and
            "segmentation".
    """
    refused: list[str] = []
    instances: Json = {}
    if "json_file" in files:
        instances, refused = _instances(files, training, needed)
    if "panoptic_json" in files:
        data = read_json(files["panoptic_json"])
        present = _existing(files["panoptic_root"], data.get("annotations"))
        refused += _refused(check_panoptic, files["panoptic_json"], data, present)
        if things is not None:
            odd = [c for c in data["categories"] if bool(c["isthing"]) != (c["id"] in things)]
            refused += [f"{files['panoptic_json']}: not of its things: {odd[0]}"] if odd else []
        if not refused and "annotations" in instances:
            refused += _contradictions(instances, data)
        if "sem_seg_root" in files:
            if not refused:  # else prepare_panoptic.py reads them all
                refused += _odd_png(files, data)
            _check_semantic_pngs(name, files["sem_seg_root"], data["annotations"])
    if refused:
        raise ValueError(
            f"Data set {name} would train wrongly. {'; '.join(refused)}. Mend the annotations, or "
            f"{remedy} to train on them as they are."
        )


def _instances(
    files: Mapping[str, str], training: bool, needed: Collection[str]
) -> tuple[Json, list[str]]:
    """The instances JSON, and what is so wrong with it that it is refused."""
    path, refused = files["json_file"], []
    data = read_json(path)
    if training or "annotations" in data:
        present = _existing(files.get("image_root"), data.get("images"))
        refused = _refused(check_instances, path, data, present)
        annotations = data["annotations"]
        if training and not data["images"]:
            raise ValueError(f"{path}: it has no images to train on")
        if training and annotations and all(a.get("iscrowd") for a in annotations):
            raise ValueError(
                f"{path}: all {len(annotations)} annotations are crowds (iscrowd 1), on which "
                f"nothing is trained"
            )
        for key in needed:
            lacking = [a["id"] for a in annotations if not _has(a, key)]
            if lacking:
                raise ValueError(
                    f"{path}: {len(lacking)} of {len(annotations)} annotations have no {key!r}, "
                    f"first {lacking[0]}. {_NEEDED[key]}"
                )
    if not training and not data.get("annotations"):
        logger.warning("%s has no annotations: there is nothing to score", path)
    return data, refused


def _check_semantic_pngs(name: str, root: str, annotations: list[Json]) -> None:
    wanted = {a["file_name"] for a in annotations}
    missing = wanted.difference(_existing(root, annotations) or ())
    if missing:
        raise ValueError(
            f"Data set {name}: {len(missing)} of {len(wanted)} semantic PNGs are not in {root!r}, "
            f"first {min(missing)}{_remedy(root)}."
        )


def _odd_png(files: Mapping[str, str], data: Json) -> list[str]:
    """What is wrong with one of a few PNGs: those of other annotations would be scored as 0."""
    labels, annotations = semantic_labels(data["categories"]), data["annotations"]
    for annotation in annotations[:: max(len(annotations) // CHECKED_PNGS, 1)]:
        path = os.path.join(files["panoptic_root"], annotation["file_name"])
        try:
            wanted = panoptic_to_semantic(read_ids(path), annotation["segments_info"], labels)
        except ValueError as e:
            return [f"{path}: {e}"]
        path = os.path.join(files["sem_seg_root"], annotation["file_name"])
        if os.path.exists(path) and not _holds(path, wanted):
            # Newer than what it should be made of, it would be kept.
            remedy = f"; delete {files['sem_seg_root']}{_remedy(files['sem_seg_root'])}"
            return [f"{path} is not what its panoptic PNG makes{remedy}"]
    return []


def _holds(path: str, labels: np.ndarray) -> bool:
    try:
        return np.array_equal(np.asarray(read_image(path)), labels)
    except ValueError:
        return False


def _contradictions(instances: Json, panoptic: Json) -> list[str]:
    """Where instances and panoptic annotations are not of the same images."""
    names = {i["id"]: Path(i["file_name"]).stem for i in instances["images"]}
    for image in panoptic["images"]:
        theirs = Path(str(image.get("file_name", ""))).stem
        if theirs and names.get(image["id"], theirs) != theirs:
            return [
                f"image {image['id']} is {names[image['id']]!r} of the instances, but {theirs!r} "
                f"of the panoptic annotations"
            ]
    things = {c["id"] for c in panoptic["categories"] if c["isthing"]}
    found = defaultdict(set)
    for annotation in instances["annotations"]:
        found[annotation["image_id"]].add(annotation["category_id"])
    segments = {
        a["image_id"]: things.intersection(s["category_id"] for s in a["segments_info"])
        for a in panoptic["annotations"]
    }
    if not found and any(segments.values()):
        return ["the instances have no annotations, where the panoptic JSON has things"]
    other = [id for id, categories in segments.items() if not categories <= found[id]]
    if len(other) > MAX_OTHER * len(segments):
        return [
            f"{len(other)} of {len(segments)} images have things of categories in their panoptic "
            f"annotations that their instances do not have, first {other[0]}"
        ]
    return []


def _has(annotation: Json, key: str) -> bool:
    return key in annotation and (key != "segmentation" or bool(annotation[key]))


def _existing(root: str | None, entries: Any) -> list[str] | None:
    if not root or not isinstance(entries, list):
        return None
    listed = set(os.listdir(root))  # one call for the many that lie in the folder itself
    found = [i.get("file_name") for i in entries if isinstance(i, dict)]
    names = [name for name in found if isinstance(name, str)]
    return [n for n in names if n in listed or os.path.exists(os.path.join(root, n))]


def _refused(check: Callable, path: str, data: Json, files: list[str] | None) -> list[str]:
    """What ``check`` finds so wrong that it is refused; the rest is logged."""
    try:
        problems = check(data, files)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    for problem in problems:
        if not problem.refuse:
            logger.warning("%s: %s", path, problem)
    return [f"{path}: {problem}" for problem in problems if problem.refuse]


def _remedy(sem_seg_root: str) -> str:
    folder, name = os.path.split(sem_seg_root)
    split = name.removeprefix("panoptic_stuff_")
    return f"; run: python tools/prepare_panoptic.py --root {folder} --splits {split}"
