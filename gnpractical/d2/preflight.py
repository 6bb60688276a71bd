"""What can be found wrong before training starts: data sets, annotations, the output folder."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from gnpractical.d2.datasets import datasets_root
from gnpractical.datasets.annotations import Problem, check_instances, check_panoptic
from gnpractical.datasets.panoptic import read_json
from gnpractical.datasets.shapes import make_shapes

logger = logging.getLogger(__name__)

_PATHS = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root")


def check_output_dir(output_dir: str) -> None:
    """Create ``output_dir`` if need be; OSError, in one line, if nothing can be written there."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir):
            pass
    except OSError as e:
        raise OSError(f"OUTPUT_DIR {output_dir!r} cannot be written: {e}") from None


def check_disk_space(cfg: CfgNode, model: nn.Module) -> None:
    """OSError if two checkpoints do not fit on OUTPUT_DIR's disk; a warning if not all do."""
    # Weights, and for the trained ones SGD's momentum, in the parameters' own type.
    size = sum(p.numel() * p.element_size() * (2 if p.requires_grad else 1)
               for p in model.parameters())  # fmt: skip
    free = shutil.disk_usage(cfg.OUTPUT_DIR).free
    count = cfg.SOLVER.MAX_ITER // max(cfg.SOLVER.CHECKPOINT_PERIOD, 1) + 1
    text = (
        f"{free / 2**20:.0f} MiB are free for OUTPUT_DIR {cfg.OUTPUT_DIR!r}; a checkpoint takes "
        f"about {size / 2**20:.0f} MiB, and SOLVER.CHECKPOINT_PERIOD keeps {count}"
    )
    if free < 2 * size:
        raise OSError(f"Disk full: {text}.")
    if free < count * size:
        logger.warning("The disk will not hold every checkpoint: %s.", text)


def check_datasets(cfg: CfgNode, names: tuple[str, ...]) -> None:
    """Raise ValueError unless the data sets are registered, complete and sound.

    The message names what was looked for and where, and the command that makes it.
    """
    for name in names:
        if name not in DatasetCatalog:
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Data set {name!r} is not registered.{hint}")
        metadata = MetadataCatalog.get(name)
        if name.startswith("gnp_shapes_"):  # made on first use
            make_shapes(Path(metadata.image_root).parents[1])
        for key in _PATHS:
            path = metadata.get(key)
            if path and not os.path.exists(path):
                raise ValueError(f"Data set {name}: {key} {path!r} does not exist. {_advice(key)}")
        if cfg.MODEL.GNP.CHECK_ANNOTATIONS:
            _check_annotations(name)


def _check_annotations(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    problems: list[tuple[str, Problem]] = []
    # LVIS's files are not quite of COCO's form, and two of COCO 2014's have known duplicates.
    is_coco = metadata.get("evaluator_type") in ("coco", "coco_panoptic_seg")
    if is_coco and metadata.get("json_file") and "2014_" not in name:
        data = read_json(metadata.json_file)
        if "annotations" in data:  # COCO's test sets have none
            files = _existing(metadata.get("image_root"), data.get("images", []))
            problems += _checked(check_instances, metadata.json_file, data, files)
    if metadata.get("panoptic_json"):
        data = read_json(metadata.panoptic_json)
        files = os.listdir(metadata.panoptic_root)
        problems += _checked(check_panoptic, metadata.panoptic_json, data, files)
        if metadata.get("sem_seg_root"):
            wanted = {a["file_name"] for a in data["annotations"]}
            missing = wanted - set(os.listdir(metadata.sem_seg_root))
            if missing:
                raise ValueError(
                    f"Data set {name}: {len(missing)} of {len(wanted)} semantic PNGs are not in "
                    f"{metadata.sem_seg_root!r}, first {min(missing)}. {_advice('sem_seg_root')}"
                )
    for path, problem in problems:
        if not problem.refuse:
            logger.warning("%s: %s", path, problem)
    refused = [f"{path}: {problem}" for path, problem in problems if problem.refuse]
    if refused:
        raise ValueError(
            f"Data set {name} would train wrongly. {'; '.join(refused)}. Mend the annotations, or "
            f"set MODEL.GNP.CHECK_ANNOTATIONS False to train on them as they are."
        )


def _existing(root: str | None, images: list[dict]) -> list[str] | None:
    if not root:
        return None
    listed = set(os.listdir(root))  # one call for the many that lie in the folder itself
    names = [i["file_name"] for i in images if "file_name" in i]
    return [n for n in names if n in listed or os.path.exists(os.path.join(root, n))]


def _checked(check, path: str, data: dict, files: list[str] | None) -> list[tuple[str, Problem]]:
    try:
        return [(path, problem) for problem in check(data, files)]
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _advice(key: str) -> str:
    root = datasets_root()
    source = "$DETECTRON2_DATASETS" if "DETECTRON2_DATASETS" in os.environ else "its default"
    text = f"Data sets are looked for in {root!r} ({source})"
    if key == "sem_seg_root":
        return f"{text}; run: python tools/prepare_panoptic.py --root {os.path.join(root, 'coco')}"
    return f"{text}; set DETECTRON2_DATASETS to the folder that holds coco/."
