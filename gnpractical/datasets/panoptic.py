"""COCO panoptic annotations: ids in PNGs, semantic PNGs for Panoptic FPN, panoptic quality.

A panoptic PNG holds one segment id a pixel, ``id = R + 256 G + 256**2 B``; 0 is void. Shapes of
arrays are (H, W) for ids and labels, (H, W, 3) for RGB.

Panoptic quality: Eq. (1) of "Panoptic Segmentation", arXiv 1801.00868, with the treatment of void
and crowd regions of COCO's evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

VOID = 0
IGNORE_LABEL = 255

Json = dict[str, Any]


def rgb_to_id(rgb: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) uint32 of an RGB image (H, W, 3)."""
    rgb = rgb.astype(np.uint32)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """RGB image (H, W, 3) uint8 of segment ids (H, W) below 2**24."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Segment ids (H, W) of a panoptic PNG.

    Raises:
        ValueError: the file is missing or is no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            return rgb_to_id(np.asarray(image.convert("RGB")))
    except (OSError, SyntaxError) as e:  # Pillow's for a broken PNG
        raise ValueError(f"{path}: not a readable panoptic PNG ({e})") from e


def semantic_labels(categories: Iterable[Json]) -> dict[int, int]:
    """category_id -> label of the semantic branch: things share 0, stuff is 1, 2, ... by id."""
    categories = list(categories)
    stuff = sorted(c["id"] for c in categories if not c["isthing"])
    if len(stuff) >= IGNORE_LABEL:
        raise ValueError(f"{len(stuff)} stuff categories do not fit an 8-bit semantic PNG (254)")
    labels = {c["id"]: 0 for c in categories if c["isthing"]}
    return labels | {category_id: i + 1 for i, category_id in enumerate(stuff)}


def panoptic_to_semantic(ids: np.ndarray, segments: list[Json], labels: dict[int, int]):
    """Semantic labels (H, W) uint8 of segment ids; void becomes 255.

    Raises:
        ValueError: a pixel's id has no segment, or a segment's category is unknown.
    """
    present, inverse = np.unique(ids, return_inverse=True)
    label_of_id = {VOID: IGNORE_LABEL}
    for segment in segments:
        if segment["category_id"] not in labels:
            raise ValueError(f"segment {segment['id']}: unknown category {segment['category_id']}")
        label_of_id[segment["id"]] = labels[segment["category_id"]]
    missing = [int(i) for i in present if int(i) not in label_of_id]
    if missing:
        raise ValueError(f"ids in the PNG that the JSON does not have: {missing[:5]}")
    lut = np.array([label_of_id[int(i)] for i in present], dtype=np.uint8)
    return lut[inverse].reshape(ids.shape)


def prepare_semantic(
    panoptic_json: str | os.PathLike,
    panoptic_dir: str | os.PathLike,
    semantic_dir: str | os.PathLike,
    workers: int | None = None,
) -> int:
    """Write the semantic PNG of every annotation of ``panoptic_json``, in parallel.

    Files that exist are kept, and a file appears only when it is complete, so that an interrupted
    run can be repeated.

    Returns:
        The number of files written.

    Raises:
        ValueError: annotations that would train wrongly, with the count and the first of them;
            the files of the good ones are written all the same.
    """
    data = read_json(panoptic_json)
    labels = semantic_labels(data["categories"])
    semantic_dir = Path(semantic_dir)
    semantic_dir.mkdir(parents=True, exist_ok=True)
    todo = [a for a in data["annotations"] if not (semantic_dir / a["file_name"]).exists()]

    def write(annotation: Json) -> str | None:
        name = annotation["file_name"]
        try:
            ids = read_ids(Path(panoptic_dir) / name)
            semantic = panoptic_to_semantic(ids, annotation["segments_info"], labels)
        except ValueError as e:
            return f"{name}: {e}"
        path = semantic_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)  # names may have folders in them
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        Image.fromarray(semantic).save(part, format="PNG")
        os.replace(part, path)
        return None

    problems = [p for p in _in_parallel(write, todo, workers, "semantic PNGs") if p]
    if problems:
        raise ValueError(
            f"{panoptic_json}: {len(problems)} of {len(data['annotations'])} annotations are not "
            f"usable, first: {'; '.join(problems[:3])}"
        )
    return len(todo)


@dataclass
class _Tally:
    """Of one category: summed IoU of the matches, true and false positives, false negatives."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: _Tally) -> _Tally:
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn
        return self


def panoptic_quality(
    gt_json: str | os.PathLike,
    gt_dir: str | os.PathLike,
    pred_json: str | os.PathLike,
    pred_dir: str | os.PathLike,
    workers: int | None = None,
) -> dict[str, dict[str, float]]:
    """Panoptic quality of COCO-format predictions, in parallel over the images.

    Returns:
        For each of "All", "Things" and "Stuff": ``pq``, ``sq``, ``rq`` in [0, 1] and ``n``, the
        number of categories that occur. With n = 0 the three are NaN.

    Raises:
        ValueError: an image without prediction, or a prediction whose JSON and PNG disagree;
            the message names the file.
    """
    gt, pred = read_json(gt_json), read_json(pred_json)
    is_thing = {c["id"]: bool(c["isthing"]) for c in gt["categories"]}
    predictions = {a["image_id"]: a for a in pred["annotations"]}
    missing = [a["image_id"] for a in gt["annotations"] if a["image_id"] not in predictions]
    if missing:
        raise ValueError(
            f"{pred_json}: no prediction for {len(missing)} of {len(gt['annotations'])} images of "
            f"{gt_json}, first ids: {missing[:5]}"
        )

    def score(annotation: Json) -> dict[int, _Tally]:
        prediction = predictions[annotation["image_id"]]
        return _match_image(
            annotation["segments_info"],
            read_ids(Path(gt_dir) / annotation["file_name"]),
            prediction["segments_info"],
            read_ids(Path(pred_dir) / prediction["file_name"]),
            is_thing,
            name=f"{pred_json}, image {annotation['image_id']}",
        )

    totals = {category: _Tally() for category in is_thing}
    for image in _in_parallel(score, gt["annotations"], workers, "panoptic quality"):
        for category, tally in image.items():
            totals[category] += tally
    return {
        "All": _average(totals.values()),
        "Things": _average(t for c, t in totals.items() if is_thing[c]),
        "Stuff": _average(t for c, t in totals.items() if not is_thing[c]),
    }


def _match_image(
    gt_segments: list[Json],
    gt_ids: np.ndarray,
    pred_segments: list[Json],
    pred_ids: np.ndarray,
    categories: Iterable[int],
    name: str,
) -> dict[int, _Tally]:
    if gt_ids.shape != pred_ids.shape:
        raise ValueError(f"{name}: {pred_ids.shape} predicted for an image of {gt_ids.shape}")
    gt = {s["id"]: s for s in gt_segments}
    pred_category = {s["id"]: s["category_id"] for s in pred_segments}
    unknown = sorted(set(pred_category.values()) - set(categories))
    if unknown:
        raise ValueError(f"{name}: unknown category ids {unknown[:5]}")
    areas = {int(i): int(n) for i, n in zip(*np.unique(pred_ids, return_counts=True), strict=True)}
    areas.pop(VOID, None)
    if areas.keys() != pred_category.keys():
        raise ValueError(
            f"{name}: segments only in the PNG {sorted(areas.keys() - pred_category.keys())[:5]}, "
            f"only in the JSON {sorted(pred_category.keys() - areas.keys())[:5]}"
        )

    pairs, counts = np.unique(
        gt_ids.astype(np.uint64) << np.uint64(32) | pred_ids, return_counts=True
    )
    overlap = {
        (int(p >> np.uint64(32)), int(p & np.uint64(0xFFFFFFFF))): int(n)
        for p, n in zip(pairs, counts, strict=True)
    }
    tallies: dict[int, _Tally] = {}
    matched_gt, matched_pred = set(), set()
    for (gt_id, pred_id), intersection in overlap.items():
        if gt_id not in gt or pred_id == VOID or gt[gt_id]["iscrowd"]:
            continue
        category = gt[gt_id]["category_id"]
        if pred_category[pred_id] != category:
            continue
        union = areas[pred_id] + gt[gt_id]["area"] - intersection - overlap.get((VOID, pred_id), 0)
        if intersection / union > 0.5:
            tally = tallies.setdefault(category, _Tally())
            tally += _Tally(iou=intersection / union, tp=1)
            matched_gt.add(gt_id)
            matched_pred.add(pred_id)

    crowd_of_category = {}  # as in COCO's evaluation, the last crowd of a category counts
    for gt_id, segment in gt.items():
        category = segment["category_id"]
        if segment["iscrowd"]:
            crowd_of_category[category] = gt_id
        elif gt_id not in matched_gt:
            tally = tallies.setdefault(category, _Tally())
            tally += _Tally(fn=1)
    for pred_id, category in pred_category.items():
        if pred_id in matched_pred:
            continue
        # Mostly on void, or on a crowd of its own category: neither right nor wrong.
        excused = overlap.get((VOID, pred_id), 0)
        if category in crowd_of_category:
            excused += overlap.get((crowd_of_category[category], pred_id), 0)
        if excused / areas[pred_id] <= 0.5:
            tally = tallies.setdefault(category, _Tally())
            tally += _Tally(fp=1)
    return tallies


def _average(tallies: Iterable[_Tally]) -> dict[str, float]:
    rows = []
    for t in tallies:
        if t.tp + t.fp + t.fn:
            weight = t.tp + 0.5 * t.fp + 0.5 * t.fn
            rows.append((t.iou / weight, t.iou / t.tp if t.tp else 0.0, t.tp / weight))
    pq, sq, rq = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 3
    return {"pq": pq, "sq": sq, "rq": rq, "n": len(rows)}


def read_json(path: str | os.PathLike) -> Json:
    """A JSON file's content; ValueError, naming the file, if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a readable JSON file ({e})") from e


def _in_parallel(fn: Callable, items: list, workers: int | None, description: str) -> list:
    # Threads: decoding PNGs and sorting ids, where the time goes, both release the GIL.
    return thread_map(
        fn, items, max_workers=workers or os.cpu_count(), desc=description, leave=False,
        disable=None if len(items) > 50 else True,
    )  # fmt: skip
