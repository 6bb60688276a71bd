"""Masks in COCO's three forms: polygons, and run lengths as numbers or compressed.

An ``image`` is its entry in the annotations, with ``height`` and ``width``.
"""

from __future__ import annotations

from typing import Any

import pycocotools.mask as coco_mask

from gnpractical.datasets.panoptic import Json


def why_undrawable(segmentation: Any, image: Json) -> str:
    """Why pycocotools, which checks nothing, would fail on a mask or write past its memory."""
    height, width = image["height"], image["width"]
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        if (
            not all(isinstance(run, int) and run >= 0 for run in runs)
            or sum(runs) != height * width
        ):
            return f"its counts must be natural numbers and add up to {height * width}"
        return ""
    if len(segmentation[0]) < 5:  # of four numbers pycocotools takes all for boxes
        return f"its first polygon has {len(segmentation[0])} coordinates, 6 are needed"
    far = 4 * max(height, width)  # polygons may overhang, but not by several images
    if not all(-far <= c <= far for polygon in segmentation for c in polygon):
        return f"its coordinates must be numbers between {-far} and {far}"
    return ""


def run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed form.

    From the third on they are differences to the one before the last, in groups of five bits, the
    lowest first, with a sixth where more follow. pycocotools checks none of it, and hotcoco finds
    those that are too long only, not those that leave memory as it was.
    """
    runs: list[int] = []
    encoded = counts.encode() if isinstance(counts, str) else counts
    if any(not 48 <= byte < 112 for byte in encoded):  # pycocotools stops at 0
        return [-1]
    data = iter(encoded)
    for byte in data:
        value, shift = (byte - 48) & 0x1F, 5
        while (byte - 48) & 0x20:
            byte = next(data, 48)
            value |= ((byte - 48) & 0x1F) << shift
            shift += 5
        if (byte - 48) & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def is_empty(segmentation: Any, image: Json) -> bool:
    """Whether nothing of a mask is in its image."""
    if isinstance(segmentation, dict):
        return coco_mask.area(to_rle(segmentation, image["height"], image["width"])) == 0
    return not any(
        len(p) >= 6
        and len(p) % 2 == 0
        and min(p[::2]) < image["width"]
        and max(p[::2]) > 0
        and min(p[1::2]) < image["height"]
        and max(p[1::2]) > 0
        for p in segmentation
    )


def is_in(segmentation: Any, box: list[float], image: Json) -> bool:
    """Whether the middle of a mask's extent is in a box, or less than a pixel beside it."""
    if isinstance(segmentation, dict):
        rle = to_rle(segmentation, image["height"], image["width"])
        x0, y0, width, height = coco_mask.toBbox(rle).tolist()
        middle = x0 + width / 2, y0 + height / 2
    else:  # polygons
        extents = [[c for polygon in segmentation for c in polygon[axis::2]] for axis in (0, 1)]
        middle = tuple((min(values) + max(values)) / 2 for values in extents)
    return all(box[i] - 1 <= middle[i] <= box[i] + box[i + 2] + 1 for i in (0, 1))


def to_rle(segmentation: Any, height: int, width: int) -> Json:
    """The compressed run-length encoding of a mask in any of COCO's three forms."""
    if isinstance(segmentation, list):  # polygons
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
