import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torch
from PIL import Image

from gnpractical.datasets.coco_files import split_files
from gnpractical.datasets.panoptic import read_ids, read_json
from gnpractical.tv.datasets import CocoImages, collate, open_splits


@pytest.fixture
def own_copy(tmp_path, datasets_dir):
    shutil.copytree(datasets_dir, tmp_path / "data")
    return tmp_path / "data"


def spoil(root, change, kind="instances", split="train"):
    path = root / "gnp_shapes" / "annotations" / f"{kind}_{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_targets_are_what_the_annotations_say(datasets_dir):
    files = split_files(str(datasets_dir / "gnp_shapes"), "val")
    dataset = CocoImages(files, panoptic=True, train=False)
    assert len(dataset) == 4
    assert dataset.things == ["disc", "box", "triangle", "star"] and dataset.stuff[0] == "sky"
    panoptic = {a["image_id"]: a for a in read_json(files["panoptic_json"])["annotations"]}
    for image, target in dataset:
        assert image.shape == (3, 120, 160) and image.dtype == torch.float32 and image.max() <= 1
        annotation = panoptic[target["image_id"]]
        ids = read_ids(f"{files['panoptic_root']}/{annotation['file_name']}")
        things = [s for s in annotation["segments_info"]
                  if s["category_id"] <= 4 and not s["iscrowd"]]  # fmt: skip
        assert target["labels"].tolist() == [s["category_id"] for s in things]
        for mask, box, segment in zip(target["masks"], target["boxes"], things, strict=True):
            inside = ids == segment["id"]
            # COCO polygons are filled, without the holes another thing may leave.
            assert mask.numpy()[inside].mean() > 0.98
            ys, xs = np.nonzero(inside)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        for segment in annotation["segments_info"]:
            values = target["semantic"][torch.from_numpy(ids.astype(np.int64) == segment["id"])]
            assert set(values.tolist()) == {max(segment["category_id"] - 4, 0)}
        assert set(target["semantic"][torch.from_numpy(ids == 0)].tolist()) <= {255}


def test_flipping_takes_everything_along(datasets_dir):
    files = split_files(str(datasets_dir / "gnp_shapes"), "train")
    straight = CocoImages(files, panoptic=True, train=False)
    flipping = CocoImages(files, panoptic=True, train=True)
    seen = set()
    for _ in range(10):
        (image, target), (flipped, turned) = straight[0], flipping[0]
        seen.add(torch.equal(image, flipped))
        if not torch.equal(image, flipped):
            assert torch.equal(image.flip(-1), flipped)
            assert torch.equal(target["masks"].flip(-1), turned["masks"])
            assert torch.equal(target["semantic"].flip(-1), turned["semantic"])
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            mirrored = torch.stack([160 - x1, y0, 160 - x0, y1], 1)
            torch.testing.assert_close(turned["boxes"], mirrored)
    assert seen == {True, False}


def test_boxes_are_clipped_and_crowds_and_empty_ones_left_out(own_copy):
    def change(data):
        first, *rest = [a for a in data["annotations"] if a["image_id"] == 1]
        first |= {"bbox": [-10, 100, 30, 60], "iscrowd": 0}
        for a in rest[:1]:
            a["iscrowd"] = 1
        for a in rest[1:]:
            a["bbox"] = [300, 10, 20, 20]
        data["annotations"] = [first, *rest]

    spoil(own_copy, change)
    files = split_files(str(own_copy / "gnp_shapes"), "train")
    dataset = CocoImages(files, panoptic=False, train=False)
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[0, 100, 20, 120]]
    assert len(dataset) == 8 and dataset[1][1]["boxes"].shape == (0, 4)
    # Training leaves the empty images out.
    assert CocoImages(files, panoptic=False, train=True).image_ids == [1]
    spoil(own_copy, lambda data: data.update(annotations=[]))
    with pytest.raises(ValueError, match="instances_train.json has no images to use"):
        CocoImages(files, panoptic=False, train=True)


def test_gray_images_become_rgb(own_copy):
    path = own_copy / "gnp_shapes" / "val" / "000001.jpg"
    Image.open(path).convert("L").save(path)
    files = split_files(str(own_copy / "gnp_shapes"), "val")
    assert CocoImages(files, panoptic=False, train=False)[0][0].shape[0] == 3


def test_splits_are_found_by_either_name(own_copy, tmp_path):
    train, val = open_splits(str(own_copy), "gnp_shapes", panoptic=True, check=True)
    assert (len(train), len(val)) == (8, 4)
    coco = tmp_path / "coco"
    shutil.copytree(own_copy / "gnp_shapes", coco)
    for path in [*coco.iterdir(), *(coco / "annotations").iterdir()]:
        for split in ("train", "val"):
            if path.stem.endswith(split):
                path.rename(path.with_name(path.stem + "2017" + path.suffix))
    train, val = open_splits(str(tmp_path), "coco", panoptic=True, check=True)
    assert (len(train), len(val)) == (8, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: shutil.rmtree(root / "gnp_shapes" / "val"), "image_root .* does not exist"),
        (lambda root: (root / "gnp_shapes/panoptic_stuff_train/000001.png").unlink(),
         "1 of 8 semantic PNGs .*tools/prepare_panoptic.py"),
        (lambda root: spoil(root, lambda d: d["annotations"][0].update(category_id=9)),
         "unknown category: 1 .*--no-check-annotations"),
        (lambda root: spoil(root, lambda d: d.pop("categories")), "no 'categories'"),
    ],
)  # fmt: skip
def test_data_that_would_train_wrongly(own_copy, change, message):
    change(own_copy)
    with pytest.raises(ValueError, match=message):
        open_splits(str(own_copy), "gnp_shapes", panoptic=True, check=True)


def test_missing_coco_names_the_path_and_the_option(tmp_path):
    with pytest.raises(ValueError, match="coco/train2017' does not exist.*--data-path"):
        open_splits(str(tmp_path), "coco", panoptic=False, check=True)


def test_collate():
    assert collate([(1, {"a": 2}), (3, {"a": 4})]) == ([1, 3], [{"a": 2}, {"a": 4}])
