"""What is wrong with COCO-format annotations, found before training instead of by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gnpractical.datasets.masks import is_empty, is_in, why_undrawable
from gnpractical.datasets.panoptic import Json, semantic_labels

# Detectron2 drops a box or mask that is empty once clipped to its image. A few occur in COCO
# itself; more than this share means coordinates of other images or of another resolution.
MAX_DROPPED = 0.01
MIN_DROPPED = 3  # in a small data set a few are more than that share and still just a few
# What some keys must hold; other tools write ids as strings or as 1.0.
_ID = (int, float, str)
_KINDS: dict[str, Any] = dict.fromkeys(("id", "image_id", "category_id"), _ID)
_KINDS |= {"file_name": str, "segments_info": list, "name": str, "bbox": list}
_KINDS |= dict.fromkeys(("height", "width"), int)


@dataclass
class Problem:
    """One kind of problem, and which of the ``total`` annotations that were looked at have it.

    Up to the share ``tolerated`` of them, a model still trains as it should.
    """

    kind: str
    total: int
    tolerated: float = 0.0
    offenders: list[str] = field(default_factory=list)

    @property
    def refuse(self) -> bool:
        """Whether a model would train wrongly."""
        count = len(self.offenders)
        if self.tolerated and count <= MIN_DROPPED < self.total:
            return False
        return count > self.tolerated * self.total

    def __str__(self) -> str:
        first = ", ".join(self.offenders[:3])
        return f"{self.kind}: {len(self.offenders)} of {self.total}, first: {first}"


def check_instances(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of an instances JSON, most serious first.

    Args:
        data: The content of the file.
        files: Those of the images' ``file_name`` that exist, or None to leave this unchecked.

    Raises:
        ValueError: The JSON is not of COCO's form. The message says where.
    """
    of_images = ("id", "file_name", "height", "width")
    images = {i["id"]: i for i in _entries(data, "images", *of_images)}
    categories = {c["id"] for c in _entries(data, "categories", "id", "name")}
    annotations = _entries(data, "annotations", "id", "image_id", "category_id", "bbox")
    n = len(annotations)
    unknown = Problem("unknown category", n)
    odd = Problem("iscrowd that is not 0 or 1, or area that is no size", n)
    bad_size = Problem("mask of another size than its image", n)
    undrawable = Problem("mask that cannot be drawn", n)
    bad_box = Problem("box outside its image, or empty", n, MAX_DROPPED)
    bad_mask = Problem("empty mask, or outside its image", n, MAX_DROPPED)
    tiny = Problem("box of less than a pixel", n, MAX_DROPPED)
    elsewhere = Problem("box that its mask is not in", n, MAX_DROPPED)
    textual = Problem("annotation id that is no number", n)
    again = Problem("annotation given again, with the same box", n, MAX_DROPPED)
    seen: set[tuple] = set()
    orphan = Problem("image id without image (ignored)", n, tolerated=0.99)
    for a in annotations:
        name = f"annotation {a['id']}"
        if a["category_id"] not in categories:
            unknown.offenders.append(f"{name} (category {a['category_id']})")
        if not _is_number(a["id"]):  # which scoring needs
            textual.offenders.append(name)
        if _is_odd(a):
            odd.offenders.append(f"{name} ({a.get('iscrowd')}, {a.get('area')})")
        content = (a["image_id"], a["category_id"], *a["bbox"])
        if content in seen:
            again.offenders.append(name)
        seen.add(content)
        image = images.get(a["image_id"])
        if image is None:
            orphan.offenders.append(f"{name} (image {a['image_id']})")
            continue
        try:
            is_odd_box = _is_outside(a["bbox"], image) or max(a["bbox"][2:]) <= 1
            if _is_outside(a["bbox"], image):
                size = f"{image['width']}x{image['height']}"
                bad_box.offenders.append(f"{name} {a['bbox']} in {size}")
            elif is_odd_box:  # as all are that are shares of the image's size
                tiny.offenders.append(f"{name} {a['bbox']}")
            # Without masks, as data of boxes alone are, there is nothing to be empty.
            mask = a.get("segmentation")
            if isinstance(mask, dict) and list(mask["size"]) != [image["height"], image["width"]]:
                size = f"{image['height']}x{image['width']}"
                bad_size.offenders.append(f"{name} {mask['size']} in {size} (height x width)")
            elif mask and (reason := why_undrawable(mask, image)):
                undrawable.offenders.append(f"{name} ({reason})")
            elif mask and is_empty(mask, image):
                bad_mask.offenders.append(name)
            elif mask and not is_odd_box and not is_in(mask, a["bbox"], image):
                elsewhere.offenders.append(f"{name} {a['bbox']}")
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise ValueError(f"{name} is malformed: {type(e).__name__}: {e}") from e
    repeated = [_repeated(data, key) for key in ("annotations", "images", "categories")]
    repeated += [_repeated(data, "images", "file_name"), _odd_categories(data)]
    # Their numbers tell them apart.
    repeated.append(_repeated(data, "categories", "name", tolerated=1.0))
    missing = _missing_files([i["file_name"] for i in images.values()], files, "image")
    problems = [unknown, odd, textual, *repeated, missing, bad_size, undrawable]
    problems += [bad_box, tiny, bad_mask, elsewhere, again, orphan]
    return [p for p in problems if p.offenders]


def check_panoptic(data: Json, files: Iterable[str] | None = None) -> list[Problem]:
    """Problems of a panoptic JSON; ``files`` are the names in the folder of its PNGs.

    The ids in the PNGs are compared where these are read, in ``panoptic.prepare_semantic``.

    Raises:
        ValueError: The JSON is not of COCO's panoptic form. The message says where.
    """
    categories = set(semantic_labels(_entries(data, "categories", "id", "name", "isthing")))
    annotations = _entries(data, "annotations", "image_id", "file_name", "segments_info")
    images = {i["id"] for i in _entries(data, "images", "id")}
    n = len(annotations)
    unknown = Problem("segment of an unknown category", n)
    duplicate = Problem("segment id used twice in an image", n)
    odd = Problem("segment of id 0, which is void, or with an iscrowd that is not 0 or 1", n)
    fraction = Problem("image id that is no whole number", n)
    orphan = Problem("image id without image", n)
    for a in annotations:
        name = a["file_name"]
        segments = _entries(a, "segments_info", "id", "category_id", of=name)
        strange = {s["category_id"] for s in segments} - categories
        if strange:
            unknown.offenders.append(f"{name} (category {min(strange)})")
        if len({s["id"] for s in segments}) < len(segments):
            duplicate.offenders.append(name)
        if any(s["id"] == 0 or _is_odd({"iscrowd": s.get("iscrowd", 0)}) for s in segments):
            odd.offenders.append(name)
        if not isinstance(a["image_id"], int) or a["image_id"] < 0:  # which scoring needs
            fraction.offenders.append(f"{name} ({a['image_id']!r})")
        if a["image_id"] not in images:
            orphan.offenders.append(name)
    repeated = [_repeated(data, key) for key in ("images", "categories")]
    repeated += [_repeated(data, "annotations", key) for key in ("image_id", "file_name")]
    missing = _missing_files([a["file_name"] for a in annotations], files, "PNG")
    problems = [orphan, unknown, _odd_categories(data), fraction, duplicate, odd]
    return [p for p in (*problems, *repeated, missing) if p.offenders]


def _entries(data: Any, key: str, *required: str, of: str = "the JSON") -> list[Json]:
    """The list ``data[key]``, or a ValueError if an entry lacks one of the ``required`` keys."""
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{of} has no {key!r} that is a list, but {str(entries)[:80]}")
    for i, entry in enumerate(entries):
        for k in required:
            if not isinstance(entry, dict) or k not in entry:
                raise ValueError(f"{key}[{i}] of {of} has no {k!r}: {str(entry)[:80]}")
            if not isinstance(entry[k], _KINDS.get(k, object)) or isinstance(entry[k], bool):
                raise ValueError(f"{key}[{i}] of {of} has an odd {k!r}: {str(entry)[:80]}")
            if k == "bbox" and [isinstance(v, int | float) for v in entry[k]] != 4 * [True]:
                raise ValueError(f"{key}[{i}] of {of} has a 'bbox' of no four numbers: {entry[k]}")
    if len({isinstance(entry["id"], str) for entry in entries if "id" in required}) > 1:
        raise ValueError(f"ids in {key!r} of {of} are partly numbers, partly text")
    return entries


def _missing_files(names: list[str], files: Iterable[str] | None, what: str) -> Problem:
    missing = [] if files is None else sorted(set(names).difference(files))
    return Problem(f"{what} that is not on disk", len(names), offenders=missing)


def _is_odd(annotation: Json) -> bool:
    """Whether a crowd would be taken for an object, or the reverse, or no area be scored."""
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area", 1)
    return not (isinstance(crowd, int) and crowd in (0, 1)) or not (
        isinstance(area, int | float) and 0 <= area < math.inf
    )


def _is_outside(box: list[float], image: Json) -> bool:
    x, y, width, height = box
    # Boxes that overhang are clipped, but one whose centre lies outside is not of this image. A
    # centre that is nan or infinite is not between the borders either.
    return (
        width <= 0
        or height <= 0
        or not 0 <= x + width / 2 <= image["width"]
        or not 0 <= y + height / 2 <= image["height"]
    )


def _repeated(data: Json, key: str, name: str = "id", tolerated: float = 0.0) -> Problem:
    counts = Counter(entry[name] for entry in data[key])
    repeated = [str(id) for id, count in counts.items() if count > 1]
    return Problem(f"{name} used twice in {key!r}", len(data[key]), tolerated, repeated)


def _odd_categories(data: Json) -> Problem:
    odd = [
        f"{c['id']!r} {c['name']!r}"
        for c in data["categories"]
        if isinstance(c["id"], str) or c["name"].encode(errors="ignore").decode() != c["name"]
    ]
    kind = "category whose id is no number, or whose name cannot be written"
    return Problem(kind, len(data["categories"]), offenders=odd)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True
