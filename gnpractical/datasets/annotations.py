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
MIN_DROPPED = 3  # in a small data set a few are more than that share and still just a few


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
        if self.tolerated and self.count <= MIN_DROPPED < self.total:
            return False
        return self.count > self.tolerated * self.total

    def __str__(self) -> str:
        return f"{self.kind}: {self.count} of {self.total}, first: {', '.join(self.first)}"


def check_instances(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of an instances JSON, most serious first.

    Args:
        data: the content of the file.
        files: those of the images' ``file_name`` that exist; None to leave this unchecked.

    Raises:
        ValueError: the JSON is not of COCO's form; the message says where.
    """
    images = {i["id"]: i for i in _entries(data, "images", "id", "file_name")}
    categories = {c["id"] for c in _entries(data, "categories", "id")}
    annotations = _entries(data, "annotations", "id", "image_id", "category_id", "bbox")
    n = len(annotations)
    unknown = Problem("unknown category", n)
    bad_size = Problem("mask of another size than its image", n)
    bad_box = Problem("box outside its image, or empty", n, MAX_DROPPED)
    bad_mask = Problem("empty mask, or outside its image", n, MAX_DROPPED)
    orphan = Problem("image id without image (ignored)", n, tolerated=0.99)
    for a in annotations:
        name = f"annotation {a['id']}"
        if a["category_id"] not in categories:
            unknown.add(f"{name} (category {a['category_id']})")
        image = images.get(a["image_id"])
        if image is None:
            orphan.add(f"{name} (image {a['image_id']})")
            continue
        try:
            if _is_outside(a["bbox"], image):
                bad_box.add(f"{name} {a['bbox']} in {image['width']}x{image['height']}")
            # Without masks, as data of boxes alone are, there is nothing to be empty.
            mask = a.get("segmentation")
            if isinstance(mask, dict) and list(mask["size"]) != [image["height"], image["width"]]:
                size = f"{image['height']}x{image['width']}"
                bad_size.add(f"{name} {mask['size']} in {size} (height x width)")
            elif mask and _is_empty(mask, image):
                bad_mask.add(name)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{name} is malformed: {type(e).__name__}: {e}") from e
    repeated = [_repeated(data, key) for key in ("annotations", "images", "categories")]
    missing = _missing_files([i["file_name"] for i in images.values()], files, "image")
    return _found([unknown, *repeated, missing, bad_size, bad_box, bad_mask, orphan])


def check_panoptic(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of a panoptic JSON; ``files``: names in the folder of its PNGs.

    Ids in the PNGs are compared where the PNGs are read, in ``panoptic.prepare_semantic``.

    Raises:
        ValueError: the JSON is not of COCO's panoptic form; the message says where.
    """
    images = {i["id"] for i in _entries(data, "images", "id")}
    categories = {c["id"] for c in _entries(data, "categories", "id", "isthing")}
    annotations = _entries(data, "annotations", "image_id", "file_name", "segments_info")
    n = len(annotations)
    orphan = Problem("image id without image", n)
    unknown = Problem("segment of an unknown category", n)
    duplicate = Problem("segment id used twice in an image", n)
    for a in annotations:
        name = a["file_name"]
        if a["image_id"] not in images:
            orphan.add(name)
        segments = _entries(a, "segments_info", "id", "category_id", of=name)
        if len({s["id"] for s in segments}) < len(segments):
            duplicate.add(name)
        strange = {s["category_id"] for s in segments} - categories
        if strange:
            unknown.add(f"{name} (category {min(strange)})")
    repeated = [_repeated(data, key) for key in ("images", "categories")]
    missing = _missing_files([a["file_name"] for a in annotations], files, "PNG")
    return _found([orphan, unknown, duplicate, *repeated, missing])


def _entries(data: Any, key: str, *required: str, of: str = "the JSON") -> list[Json]:
    """The list ``data[key]``; ValueError unless each entry has what is ``required``."""
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{of} has no {key!r} that is a list, but {str(entries)[:80]}")
    for i, entry in enumerate(entries):
        for k in required:
            if not isinstance(entry, dict) or k not in entry:
                raise ValueError(f"{key}[{i}] of {of} has no {k!r}: {str(entry)[:80]}")
    return entries


def _missing_files(names: list[str], files: Iterable[str] | None, what: str) -> Problem:
    problem = Problem(f"{what} that is not on disk", len(names))
    if files is not None:
        for name in sorted(set(names).difference(files)):
            problem.add(name)
    return problem


def _is_outside(box: list[float], image: Json) -> bool:
    x, y, width, height = box
    if not all(math.isfinite(v) for v in box):
        return True
    # Boxes that overhang are clipped; one whose centre lies outside is not of this image.
    return (
        width <= 0
        or height <= 0
        or not 0 <= x + width / 2 <= image["width"]
        or not 0 <= y + height / 2 <= image["height"]
    )


def _repeated(data: Json, key: str) -> Problem:
    counts = Counter(entry["id"] for entry in data[key])
    problem = Problem(f"id used twice in {key!r}", len(data[key]))
    for id, count in counts.items():
        if count > 1:
            problem.add(str(id))
    return problem


def _is_empty(segmentation: Any, image: Json) -> bool:
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):  # uncompressed: runs of 0 and 1 in turn
            return sum(counts[1::2]) == 0
        return int(coco_mask.area(segmentation)) == 0
    return not any(
        len(p) >= 6
        and len(p) % 2 == 0
        and min(p[::2]) < image["width"]
        and max(p[::2]) > 0
        and min(p[1::2]) < image["height"]
        and max(p[1::2]) > 0
        for p in segmentation
    )


def _found(problems: list[Problem]) -> list[Problem]:
    return [p for p in problems if p.count]
