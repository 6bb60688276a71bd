"""COCO panoptic annotations: ids in PNGs, semantic PNGs for Panoptic FPN, panoptic quality.

A panoptic PNG holds one segment id a pixel, ``id = R + 256 G + 256**2 B``; 0 is void. Shapes of
arrays are (H, W) for ids and labels, (H, W, 3) for RGB.

Panoptic quality is hotcoco's: Eq. (1) of "Panoptic Segmentation", arXiv 1801.00868, with the
treatment of void and crowd regions of COCO's evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from gnpractical.datasets.image_files import check_is_file, read_image

VOID = 0
IGNORE_LABEL = 255
# Of an image's longer side, from 2 pixels on: tools round boxes, or end them at another pixel. Some
# give stuff the box of the whole image.
BOX_TOLERANCE = 0.05

Json = dict[str, Any]


def rgb_to_id(rgb: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) uint32 of an RGB image (H, W, 3)."""
    rgb = rgb.astype(np.uint32)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """RGB image (H, W, 3) uint8 of segment ids (H, W) below 2**24."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Segment ids (H, W) of a panoptic PNG, not turned, as others read them, too.

    The errors are those of :func:`read_image`.
    """
    return rgb_to_id(np.asarray(read_image(path, upright=False).convert("RGB")))


def check_labels(
    labels: Image.Image, path: str, classes: int, *, training: bool, ignored: int = IGNORE_LABEL
) -> None:
    """ValueError for semantic labels on which no model of so many classes can be trained, or scored
    if it is not for ``training``."""
    if labels.mode != "L":
        raise ValueError(f"{path}: semantic labels must be 8-bit gray, got {labels.mode!r}")
    found = [label for label, count in enumerate(labels.histogram()) if count and label != ignored]
    if not found and training:
        raise ValueError(
            f"{path}: every pixel is void ({ignored}), and a batch of such has a loss of nan; "
            f"leave the image out"
        )
    if found and found[-1] >= classes:
        raise ValueError(f"{path}: has label {found[-1]}, but the model has {classes} classes")


def semantic_labels(categories: Iterable[Json]) -> dict[int, int]:
    """category_id -> label of the semantic branch: things share 0, stuff is 1, 2, ... by id."""
    categories = list(categories)
    for category in categories:
        if category["isthing"] not in (0, 1):
            raise ValueError(f"isthing must be 0 or 1: {str(category)[:80]}")
    stuff = sorted(c["id"] for c in categories if not c["isthing"])
    if len(stuff) >= IGNORE_LABEL:
        raise ValueError(f"{len(stuff)} stuff categories do not fit an 8-bit semantic PNG (254)")
    labels = {c["id"]: 0 for c in categories if c["isthing"]}
    return labels | {category_id: i + 1 for i, category_id in enumerate(stuff)}


def panoptic_to_semantic(ids: np.ndarray, segments: list[Json], labels: dict[int, int]):
    """Semantic labels (H, W) uint8 of segment ids; void becomes 255.

    Raises:
        ValueError: A pixel's id has no segment, a segment's category is unknown, or a segment is
            elsewhere in the PNG than its ``bbox``: the PNG is of another image, or mirrored.
    """
    present, inverse = np.unique(ids, return_inverse=True)
    label_of_id = {VOID: IGNORE_LABEL}
    for segment in segments:
        if segment["category_id"] not in labels:
            raise ValueError(f"segment {segment['id']}: unknown category {segment['category_id']}")
        label_of_id[segment["id"]] = labels[segment["category_id"]]
    missing = sorted(set(present.tolist()) - label_of_id.keys())
    if missing:
        raise ValueError(f"ids in the PNG that the JSON does not have: {missing[:5]}")
    numbers = inverse.reshape(ids.shape)
    _check_boxes(segments, present.tolist(), numbers)
    labels_present = np.array([label_of_id[i] for i in present.tolist()], dtype=np.uint8)
    return labels_present[numbers]


def _check_boxes(segments: list[Json], present: list[int], numbers: np.ndarray) -> None:
    """Compare segments' boxes with ``numbers`` (H, W), those of the ids that are ``present``."""
    height, width = numbers.shape
    in_row = np.zeros((len(present), height), bool)
    in_row[numbers, np.arange(height)[:, None]] = True
    in_column = np.zeros((len(present), width), bool)
    in_column[numbers, np.arange(width)] = True
    for segment in segments:
        box = segment.get("bbox")
        if not box or segment["id"] not in present:
            continue
        number = present.index(segment["id"])
        xs, ys = np.flatnonzero(in_column[number]), np.flatnonzero(in_row[number])
        found = [int(v) for v in (xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1)]
        tolerance = max(2, BOX_TOLERANCE * max(numbers.shape))
        if not (_are_near(found, box, tolerance) or _are_near([0, 0, width, height], box, 0)):
            raise ValueError(
                f"segment {segment['id']} has the box {found} in the PNG, but the bbox {box} in "
                f"the JSON"
            )


def _are_near(numbers: list[int], others: Any, tolerance: float) -> bool:
    try:
        return all(abs(a - b) <= tolerance for a, b in zip(numbers, others, strict=True))
    except (TypeError, ValueError):
        return False


def prepare_semantic(
    panoptic_json: str | os.PathLike,
    panoptic_dir: str | os.PathLike,
    semantic_dir: str | os.PathLike,
    workers: int | None = None,
) -> int:
    """Write the semantic PNG of every annotation of ``panoptic_json``, in parallel.

    Files that are newer than what they are made of are kept, by the time at which each came to its
    place, and a file appears only when it is complete, so that an interrupted run can be repeated.

    Returns:
        The number of files written.

    Raises:
        ValueError: A model would learn something wrong from some of the annotations. The message
            names the first of them; the files of the others are written all the same.
    """
    data = read_json(panoptic_json)
    labels = semantic_labels(data["categories"])
    semantic_dir = Path(semantic_dir)
    semantic_dir.mkdir(parents=True, exist_ok=True)
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in data.get("images", [])}

    def write(annotation: Json) -> str | None:
        name = annotation["file_name"]
        try:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError("file names must be below the folder of the PNGs")
            ids = read_ids(Path(panoptic_dir) / name)
            size = sizes.get(annotation["image_id"], (None, None))
            if None not in size and ids.shape != size:
                raise ValueError(f"{ids.shape} pixels, but {size} (height, width) in the JSON")
            semantic = panoptic_to_semantic(ids, annotation["segments_info"], labels)
        except ValueError as e:
            return f"{name}: {e}"
        path = semantic_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)  # names may have folders in them
        part = path.with_name(f".{path.name}.part")
        Image.fromarray(semantic).save(part, format="PNG")
        os.replace(part, path)
        return None

    def up_to_date(name: str) -> bool:
        try:
            made, source = (os.stat(Path(folder, name)) for folder in (semantic_dir, panoptic_dir))
        except OSError:
            return False
        # Not st_mtime, which unpacking and copying can set to long ago.
        return made.st_size > 0 and made.st_ctime >= max(source.st_ctime, written)

    with FileLock(semantic_dir.with_name(f".{semantic_dir.name}.lock")):
        for part in semantic_dir.rglob(".*.part"):  # of a run that was killed
            part.unlink()
        written = os.stat(panoptic_json).st_ctime
        todo = [a for a in data["annotations"] if not up_to_date(a["file_name"])]
        # Threads: decoding PNGs and sorting ids, where the time goes, both release the GIL.
        workers = workers or os.cpu_count()
        results = thread_map(
            write, todo, max_workers=workers, desc="semantic PNGs", leave=False, disable=None
        )
    problems = [p for p in results if p]
    if problems:
        raise ValueError(
            f"{panoptic_json}: {len(problems)} of {len(data['annotations'])} annotations are not "
            f"usable, first: {'; '.join(problems[:3])}"
        )
    return len(todo)


def panoptic_quality(
    gt_json: str | os.PathLike,
    gt_dir: str | os.PathLike,
    pred_json: str | os.PathLike,
    pred_dir: str | os.PathLike,
) -> dict[str, dict[str, float]]:
    """Panoptic quality of COCO-format predictions, in parallel over the images.

    Returns:
        For each of "All", "Things" and "Stuff": ``pq``, ``sq``, ``rq`` in [0, 1] and ``n``, the
        number of categories that occur. With n = 0 the three are NaN.

    Raises:
        ValueError: A file cannot be read, an image has no prediction, the JSON and the PNG of a
            prediction disagree, or a category has no ``isthing``. The message names the file.
    """
    from hotcoco.panoptic import PanopticEval  # here, so that this module's import stays light

    # Not the path: hotcoco would refuse the file for fields that do not matter here, such as the
    # number that CVAT writes as an image's date_captured.
    data = read_json(gt_json)
    gt = {key: data[key] for key in ("annotations", "categories") if key in data}
    for annotation in gt.get("annotations", ()):  # areas are counted, the JSON's may be others
        for segment in annotation["segments_info"]:
            segment.pop("area", None)
    try:
        evaluation = PanopticEval(gt, pred_json, gt_folder=gt_dir, pred_folder=pred_dir)
        evaluation.evaluate()
    except (OSError, ValueError) as e:
        raise ValueError(f"{pred_json} cannot be scored against {gt_json}: {e}") from e
    results = evaluation.results()
    if results["reference_deviations"]:
        raise ValueError(f"{gt_json}: {'; '.join(results['reference_deviations'])}")
    quality = {name: results[name] for name in ("All", "Things", "Stuff")}
    nothing = dict.fromkeys(("pq", "sq", "rq"), float("nan")) | {"n": 0}  # hotcoco says -1
    return {name: split if split["n"] else nothing for name, split in quality.items()}


def read_json(path: str | os.PathLike) -> Json:
    """The content of a JSON file, or a ValueError that names it if it is missing or malformed."""
    check_is_file(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a readable JSON file ({e})") from e
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object as COCO's, not a {type(data).__name__}")
    return data
