"""What is wrong with COCO-format annotations, found before training instead of by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pycocotools.mask as coco_mask

Json = dict[str, Any]

# Detectron2 drops a box or mask that is empty once clipped to its image. A few occur in COCO
# itself; more than this share means coordinates of other images or of another resolution.
MAX_DROPPED = 0.01


@dataclass
class Problem:
    """One kind of problem.

    Attributes:
        kind: what is wrong.
        total: how many annotations were looked at.
        count: how many have the problem.
        first: the first few of them.
        tolerated: the share of ``total`` up to which training is still right.
    """

    kind: str
    total: int
    tolerated: float = 0.0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, offender: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(offender)

    @property
    def refuse(self) -> bool:
        """Whether a model would train wrongly."""
        return self.count > self.tolerated * self.total

    def __str__(self) -> str:
        return f"{self.kind}: {self.count} of {self.total}, first: {', '.join(self.first)}"


def check_instances(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of an instances JSON, most serious first.

    Args:
        data: the content of the file.
        files: names in the image folder; None to leave images' existence unchecked.
    """
    annotations = data["annotations"]
    n = len(annotations)
    images = {i["id"]: i for i in data["images"]}
    categories = {c["id"] for c in data["categories"]}
    unknown = Problem("unknown category", n)
    duplicate = Problem("annotation id used twice", n)
    bad_box = Problem("box outside its image, or empty", n, MAX_DROPPED)
    bad_mask = Problem("empty mask", n, MAX_DROPPED)
    orphan = Problem("image id without image (ignored)", n, tolerated=1.0)
    seen = Counter(a["id"] for a in annotations)
    for a in annotations:
        name = f"annotation {a['id']}"
        if seen[a["id"]] > 1:
            duplicate.add(name)
        if a["category_id"] not in categories:
            unknown.add(f"{name} (category {a['category_id']})")
        image = images.get(a["image_id"])
        if image is None:
            orphan.add(f"{name} (image {a['image_id']})")
        elif _is_outside(a["bbox"], image):
            bad_box.add(f"{name} {a['bbox']} in {image['width']}x{image['height']}")
        if "segmentation" in a and _is_empty(a["segmentation"]):
            bad_mask.add(name)
    missing = _missing_files((i["file_name"] for i in data["images"]), files, "image")
    return _found([unknown, duplicate, missing, bad_box, bad_mask, orphan])


def check_panoptic(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of a panoptic JSON; ``files``: names in the folder of its PNGs.

    Ids in the PNGs are compared where the PNGs are read, in ``panoptic.prepare_semantic``.
    """
    images = {i["id"] for i in data["images"]}
    categories = {c["id"] for c in data["categories"]}
    n = len(data["annotations"])
    orphan = Problem("image id without image", n)
    unknown = Problem("segment of an unknown category", n)
    duplicate = Problem("segment id used twice in an image", n)
    for a in data["annotations"]:
        if a["image_id"] not in images:
            orphan.add(a["file_name"])
        ids = [s["id"] for s in a["segments_info"]]
        if len(set(ids)) < len(ids):
            duplicate.add(a["file_name"])
        strange = {s["category_id"] for s in a["segments_info"]} - categories
        if strange:
            unknown.add(f"{a['file_name']} (category {min(strange)})")
    missing = _missing_files((a["file_name"] for a in data["annotations"]), files, "PNG")
    return _found([orphan, unknown, duplicate, missing])


def _missing_files(names: Iterable[str], files: Iterable[str] | None, what: str) -> Problem:
    names = list(names)
    problem = Problem(f"{what} that is not on disk", len(names))
    if files is not None:
        for name in sorted(set(names) - set(files)):
            problem.add(name)
    return problem


def _is_outside(box: list[float], image: Json) -> bool:
    x, y, width, height = box
    if not all(math.isfinite(v) for v in box):
        return True
    return (
        min(x + width, image["width"]) <= max(x, 0)
        or min(y + height, image["height"]) <= max(y, 0)
        # Half of it outside: coordinates that overshoot by rounding are clipped, no more.
        or x < -width / 2
        or y < -height / 2
        or x + width / 2 > image["width"]
        or y + height / 2 > image["height"]
    )


def _is_empty(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):  # uncompressed: runs of 0 and 1 in turn
            return sum(counts[1::2]) == 0
        return int(coco_mask.area(segmentation)) == 0
    return not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def _found(problems: list[Problem]) -> list[Problem]:
    return [p for p in problems if p.count]
