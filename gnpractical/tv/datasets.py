"""COCO-format images with the targets of torchvision's detection models and of Panoptic FPN."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gnpractical.datasets.coco_files import check_annotations, check_files, split_files
from gnpractical.datasets.panoptic import read_json
from gnpractical.datasets.shapes import FOLDER, make_shapes
from gnpractical.tv.distributed import rank


class CocoImages(Dataset):
    """Images (3, H, W) float in [0, 1], and a target for each.

    A target has ``boxes`` (N, 4) as x0, y0, x1, y1, ``labels`` (N,) from 1, ``image_id``, and
    for the panoptic model ``masks`` (N, H, W) and ``semantic`` (H, W). Crowds are left out, and
    boxes that are empty once clipped to the image.

    Args:
        files: of ``coco_files.split_files``.
        panoptic: whether there are masks and semantic labels.
        train: flip half of the images, and leave out those that teach a detector nothing.

    Attributes:
        things, stuff: names of the categories in the order of their labels.
        thing_ids, stuff_ids: and their category ids.
    """

    def __init__(self, files: Mapping[str, str], *, panoptic: bool, train: bool) -> None:
        self.files, self.panoptic = files, panoptic
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(files["json_file"])
        categories = sorted(self.coco.dataset["categories"], key=lambda c: c["id"])
        self.things = [c["name"] for c in categories]
        self.thing_ids = [c["id"] for c in categories]
        self.stuff: list[str] = []
        self.stuff_ids: list[int] = []
        if panoptic:
            data = read_json(files["panoptic_json"])
            stuff = sorted((c for c in data["categories"] if not c["isthing"]),
                           key=lambda c: c["id"])  # fmt: skip
            self.stuff = [c["name"] for c in stuff]
            self.stuff_ids = [c["id"] for c in stuff]
        self._label_of = {category_id: i + 1 for i, category_id in enumerate(self.thing_ids)}
        self.image_ids = sorted(self.coco.imgs)
        if train and not panoptic:
            self.image_ids = [i for i in self.image_ids if self._annotations(i)]
        if not self.image_ids:
            raise ValueError(f"{files['json_file']} has no images to use")
        self._transform = v2.Compose([
            v2.RandomHorizontalFlip(0.5 if train else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image_id = self.image_ids[index]
        image = self.read_image(index)
        size = (image.height, image.width)
        annotations = self._annotations(image_id)
        boxes = torch.tensor([box for _, box in annotations], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self._label_of[a["category_id"]] for a, _ in annotations],
                                   dtype=torch.int64),
            "image_id": image_id,
        }  # fmt: skip
        if self.panoptic:
            masks = [self.coco.annToMask(a) for a, _ in annotations]
            target["masks"] = tv_tensors.Mask(
                np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
            )
            name = Path(self.coco.imgs[image_id]["file_name"]).stem + ".png"
            with Image.open(os.path.join(self.files["sem_seg_root"], name)) as png:
                target["semantic"] = tv_tensors.Mask(np.array(png))
        return self._transform(tv_tensors.Image(np.array(image).transpose(2, 0, 1)), target)

    def read_image(self, index: int) -> Image.Image:
        """The image as it is on disk, in RGB."""
        name = self.coco.imgs[self.image_ids[index]]["file_name"]
        with Image.open(os.path.join(self.files["image_root"], name)) as image:
            return image.convert("RGB")

    def _annotations(self, image_id: int) -> list[tuple[dict, list[float]]]:
        """The image's instances, each with its clipped box."""
        size = self.coco.imgs[image_id]
        instances = []
        for a in self.coco.imgToAnns[image_id]:
            x, y, w, h = a["bbox"]
            box = [max(x, 0.0), max(y, 0.0), min(x + w, size["width"]), min(y + h, size["height"])]
            if not a.get("iscrowd") and box[2] > box[0] and box[3] > box[1]:
                instances.append((a, box))
        return instances


def open_splits(
    data_path: str, name: str, *, panoptic: bool, check: bool
) -> tuple[CocoImages, CocoImages]:
    """The training and the validation split of ``data_path/name``, which exist and are sound.

    COCO's splits are called train2017 and val2017, others' train and val. gnp_shapes is made on
    first use.

    Args:
        check: look for annotations that would train wrongly.

    Raises:
        ValueError: files missing or wrong; the message says what makes them.
    """
    folder = os.path.join(data_path, name)
    if name == FOLDER:
        make_shapes(data_path)  # several processes may: the first to finish wins
    year = "2017" if name == "coco" or os.path.exists(
        os.path.join(folder, "annotations", "instances_train2017.json")
    ) else ""  # fmt: skip
    splits = []
    for split in ("train", "val"):
        files = split_files(folder, split + year)
        if not panoptic:
            files = {key: files[key] for key in ("image_root", "json_file")}
        title = f"{name} {split}{year}"
        check_files(title, files, data_path, "--data-path")
        if check and rank() == 0:
            remedy = "give --no-check-annotations"
            check_annotations(title, files, data_path, "--data-path", remedy)
        splits.append(CocoImages(files, panoptic=panoptic, train=split == "train"))
    return splits[0], splits[1]


def collate(samples: list[tuple]) -> tuple[list, list]:
    """A batch as torchvision's detection models take it: a list of images, a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
