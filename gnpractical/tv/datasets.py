"""COCO-format images with the targets of torchvision's detection models and of Panoptic FPN."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gnpractical.datasets.coco_files import check_annotations, check_files, split_files, split_name
from gnpractical.datasets.image_files import check_depth, check_size, read_image
from gnpractical.datasets.masks import to_rle
from gnpractical.datasets.panoptic import Json, check_labels, read_json, semantic_labels
from gnpractical.datasets.shapes import FOLDER, make_shapes
from gnpractical.tv.distributed import all_gather, rank


class CocoImages(Dataset):
    """Images (3, H, W) float in [0, 1], and a target for each.

    A target has ``boxes`` (N, 4) as x0, y0, x1, y1, ``labels`` (N,) from 1, ``image_id``, and for
    the panoptic model ``masks`` (N, H, W) and ``semantic`` (H, W). Crowds are left out, and boxes
    that are empty once they are clipped to the image.

    Args:
        files: What ``coco_files.split_files`` returns.
        panoptic: Whether the targets have masks and semantic labels.
        train: Flip half of the images, and without ``panoptic`` leave out those without boxes.

    Attributes:
        things, stuff: The name of each category by its id, in the order of the labels from 1.
        coco: The annotations to score against, or None of a training split.

    Raises:
        ValueError: There are no images, or the files contradict one another.
    """

    def __init__(self, files: Mapping[str, str], *, panoptic: bool, train: bool) -> None:
        self.files, self.panoptic = files, panoptic
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(files["json_file"])
        for a in coco.anns.values():  # what scoring asks for and some files leave out
            a.setdefault("iscrowd", 0)
            a.setdefault("area", a["bbox"][2] * a["bbox"][3])
        self.things = {id: coco.cats[id]["name"] for id in sorted(coco.cats)}
        self.stuff: dict[int, str] = {}
        semantic = self._read_panoptic(set(coco.imgs)) if panoptic else {}
        records = []
        for image_id, image in sorted(coco.imgs.items()):
            instances = _instances(image, coco.imgToAnns[image_id], panoptic)
            if instances or panoptic or not train:
                records.append(pickle.dumps((image, instances, semantic.get(image_id, ""))))
        if not records:
            raise ValueError(f"{files['json_file']} has no images to use")
        # One array, not a million Python objects, of which every loader process would get a copy.
        self._records = np.frombuffer(b"".join(records), np.uint8)
        self._ends = np.cumsum([len(r) for r in records])
        self.coco = None if train else coco
        self._transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5 if train else 0.0),
                v2.ToDtype(torch.float32, scale=True),
                v2.ToPureTensor(),
            ]
        )

    @property
    def classes(self) -> dict[str, dict[Any, str]]:
        """As checkpoints record them."""
        return {"things": self.things, "stuff": self.stuff}

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        start = self._ends[index - 1] if index else 0
        entry, instances, semantic = pickle.loads(self._records[start : self._ends[index]].data)
        image = _open(os.path.join(self.files["image_root"], entry["file_name"]), entry)
        size = (image.height, image.width)
        label_of = {category_id: i + 1 for i, category_id in enumerate(self.things)}
        boxes = torch.tensor([box for _, box, _ in instances], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([label_of[c] for c, _, _ in instances], dtype=torch.int64),
            "image_id": entry["id"],
        }
        if self.panoptic:
            masks = [coco_mask.decode(to_rle(mask, *size)) for _, _, mask in instances]
            target["masks"] = tv_tensors.Mask(
                np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
            )
            path = os.path.join(self.files["sem_seg_root"], semantic)
            labels = _open(path, entry)
            training = self.coco is None
            check_labels(labels, path, len(self.stuff) + 1, training=training)
            target["semantic"] = tv_tensors.Mask(np.array(labels))
        pixels = np.array(image.convert("RGB")).transpose(2, 0, 1)
        return self._transform(tv_tensors.Image(pixels), target)

    def _read_panoptic(self, image_ids: set[int]) -> dict[int, str]:
        """Take the stuff categories from the panoptic JSON, and return the PNG of each image."""
        path = self.files["panoptic_json"]
        data = read_json(path)
        labels = semantic_labels(data["categories"])  # as the semantic PNGs were made
        names = {c["id"]: c["name"] for c in data["categories"]}
        self.stuff = {category_id: names[category_id] for category_id, i in labels.items() if i}
        things = sorted(labels.keys() - self.stuff.keys())
        if things != list(self.things):
            raise ValueError(
                f"{path} has the thing categories {things[:10]}, {self.files['json_file']} has "
                f"{list(self.things)[:10]}: they must be the same"
            )
        if not self.stuff:
            raise ValueError(f"{path} has no stuff categories, which Panoptic FPN needs")
        semantic = {a["image_id"]: a["file_name"] for a in data["annotations"]}
        if semantic.keys() != image_ids:
            odd = sorted(semantic.keys() ^ image_ids, key=str)
            raise ValueError(
                f"{path} and {self.files['json_file']} must be of the same images; {len(odd)} are "
                f"in one alone, first id {odd[0]}"
            )
        return semantic


def open_split(data_path: str, name: str, split: str, *, panoptic: bool, check: bool) -> CocoImages:
    """The split "train" or "val" of the data set in ``data_path/name``.

    Its files are called ``train2017`` and so on where COCO's are. gnp_shapes is made on first use.
    With ``check``, annotations from which a model would learn something wrong are an error.

    Raises:
        ValueError: Files are missing or wrong. The message says what makes them.
    """
    folder = os.path.join(data_path, name)
    if name == FOLDER:
        make_shapes(data_path)  # several processes may: the first to finish wins
    called = f"{split}2017" if name == "coco" else split_name(folder, split)
    files = split_files(folder, called)
    if not panoptic:
        files = {key: files[key] for key in ("image_root", "json_file")}
    title = f"{name} {called}"
    check_files(title, files, data_path, "--data-path")
    if check and rank() == 0:
        remedy = "give --no-check-annotations"
        check_annotations(title, files, remedy, training=split == "train")
    all_gather(None)  # the others wait for the verdict; torchrun ends them if it is an error
    return CocoImages(files, panoptic=panoptic, train=split == "train")


def check_categories(train: CocoImages, val: CocoImages) -> None:
    """Raise ValueError unless both splits have the same categories, from which labels are made."""
    odd = (train.things.items() ^ val.things.items()) | (train.stuff.items() ^ val.stuff.items())
    if odd:
        raise ValueError(
            f"{train.files['json_file']} and {val.files['json_file']} must have the same "
            f"categories; {len(odd)} are in one alone, first {min(odd)}"
        )


def collate(samples: list[tuple]) -> tuple[list, list]:
    """A batch as torchvision's detection models take it: a list of images, a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _instances(image: Json, annotations: list[Json], panoptic: bool) -> list[tuple]:
    """Category id, clipped box and segmentation of the image's instances."""
    instances = []
    for a in annotations:
        x, y, w, h = a["bbox"]
        box = [max(x, 0.0), max(y, 0.0), min(x + w, image["width"]), min(y + h, image["height"])]
        if not a["iscrowd"] and box[2] > box[0] and box[3] > box[1]:
            if panoptic and not a.get("segmentation"):
                raise ValueError(
                    f"annotation {a['id']} has no 'segmentation', which Panoptic FPN needs"
                )
            instances.append((a["category_id"], box, a["segmentation"] if panoptic else None))
    return instances


def _open(path: str, entry: Json) -> Image.Image:
    """The image at ``path``, upright, of the size that its ``entry`` in the annotations says."""
    image = read_image(path)
    check_depth(image, path)
    check_size(image, path, entry)
    return image
