import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torch
from PIL import Image

from gnpractical.datasets.coco_files import split_files
from gnpractical.datasets.panoptic import read_ids, read_json
from gnpractical.tv.datasets import CocoImages, check_categories, collate, open_split


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
    assert dataset.things == {1: "disc", 2: "box", 3: "triangle", 4: "star"}
    assert dataset.stuff == {5: "sky", 6: "grass", 7: "water", 8: "sand"}
    panoptic = {a["image_id"]: a for a in read_json(files["panoptic_json"])["annotations"]}
    for image, target in dataset:
        assert image.shape == (3, 120, 160) and image.dtype == torch.float32 and image.max() <= 1
        annotation = panoptic[target["image_id"]]
        ids = read_ids(f"{files['panoptic_root']}/{annotation['file_name']}")
        things = [
            s for s in annotation["segments_info"] if s["category_id"] <= 4 and not s["iscrowd"]
        ]
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
    training = CocoImages(files, panoptic=False, train=True)
    assert len(training) == 1 and training[0][1]["image_id"] == 1
    spoil(own_copy, lambda data: data.update(annotations=[]))
    with pytest.raises(ValueError, match="instances_train.json has no images to use"):
        CocoImages(files, panoptic=False, train=True)


def test_images_of_other_kinds(own_copy):
    files = split_files(str(own_copy / "gnp_shapes"), "val")
    dataset = CocoImages(files, panoptic=False, train=False)
    path = own_copy / "gnp_shapes" / "val" / "000001.jpg"
    upright = Image.open(path).convert("L")
    for mode in ("L", "RGBA", "P", "1"):
        upright.convert(mode).save(path, format="PNG")
        assert dataset[0][0].shape == (3, 120, 160) and 0.2 < dataset[0][0].mean() < 0.8
    # A camera held sideways: the pixels lie, and EXIF says how they are to be seen.
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, format="PNG", exif=exif)
    turned = (255 * dataset[0][0][0]).round().int().numpy()
    assert np.abs(turned - np.asarray(upright)).max() <= 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: Image.new("I;16", (160, 120)).save(path, format="PNG"), "8 are required"),
        (lambda path: Image.new("L", (120, 160)).save(path), "120x160 pixels, but 160x120 in the"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a readable image"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_images_that_cannot_be_used_are_named(own_copy, change, message):
    files = split_files(str(own_copy / "gnp_shapes"), "val")
    dataset = CocoImages(files, panoptic=False, train=False)
    change(own_copy / "gnp_shapes" / "val" / "000002.jpg")
    assert dataset[0][0].shape == (3, 120, 160)
    with pytest.raises(ValueError, match=f"000002.jpg.*{message}"):
        dataset[1]


def test_names_with_folders_and_annotations_without_area(own_copy):
    root = own_copy / "gnp_shapes"
    (root / "val" / "day").mkdir()
    (root / "val" / "000001.jpg").rename(root / "val" / "day" / "x.jpg")
    (root / "panoptic_stuff_val" / "000001.png").rename(root / "panoptic_stuff_val" / "y.png")

    def change(data):
        data["images"][0]["file_name"] = "day/x.jpg"
        for a in data["annotations"]:
            a.pop("area", None)
            a.pop("iscrowd", None)

    spoil(own_copy, change, split="val")
    spoil(own_copy, lambda d: d["annotations"][0].update(file_name="y.png"), "panoptic", "val")
    dataset = CocoImages(split_files(str(root), "val"), panoptic=True, train=False)
    assert dataset[0][1]["semantic"].shape == (120, 160)
    assert all(a["area"] > 0 and a["iscrowd"] == 0 for a in dataset.coco.anns.values())


def test_both_splits_need_the_same_categories(own_copy):
    def opened(split):
        return open_split(str(own_copy), "gnp_shapes", split, panoptic=False, check=True)

    check_categories(opened("train"), opened("val"))
    spoil(own_copy, lambda d: d["categories"].append({"id": 7, "name": "cat"}), split="val")
    with pytest.raises(ValueError, match=r"same categories; 1 are .* first \(7, 'cat'\)"):
        check_categories(opened("train"), opened("val"))


def test_splits_are_found_by_either_name(own_copy, tmp_path):
    def sizes(root, name):
        return [
            len(open_split(str(root), name, split, panoptic=True, check=True))
            for split in ("train", "val")
        ]

    assert sizes(own_copy, "gnp_shapes") == [8, 4]
    coco = tmp_path / "coco"
    shutil.copytree(own_copy / "gnp_shapes", coco)
    for path in [*coco.iterdir(), *(coco / "annotations").iterdir()]:
        for split in ("train", "val"):
            if path.stem.endswith(split):
                path.rename(path.with_name(path.stem + "2017" + path.suffix))
    assert sizes(tmp_path, "coco") == [8, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: shutil.rmtree(root / "gnp_shapes" / "train"), "image_root .* does not exist"),
        (
            lambda root: (root / "gnp_shapes/panoptic_stuff_train/000001.png").unlink(),
            "1 of 8 semantic PNGs .*prepare_panoptic.py --root .*gnp_shapes --splits train",
        ),
        (
            lambda root: spoil(root, lambda d: d["annotations"][0].update(category_id=9)),
            "unknown category: 1 .*--no-check-annotations",
        ),
        (lambda root: spoil(root, lambda d: d.pop("categories")), "no 'categories'"),
        (
            lambda root: spoil(root, lambda d: [a.pop("segmentation") for a in d["annotations"]]),
            r"annotation \d+ has no 'segmentation'",
        ),
        (
            lambda root: spoil(root, lambda d: d["categories"].pop(), "panoptic")
            or spoil(root, lambda d: d.update(annotations=[]), "panoptic"),
            "must be of the same im",
        ),
        (
            lambda root: spoil(root, lambda d: d["categories"].append({"id": 5, "name": "sky"})),
            r"has the thing categories \[1, 2, 3, 4\], .* has \[1, 2, 3, 4, 5\]",
        ),
    ],
)
def test_data_that_would_train_wrongly(own_copy, change, message):
    change(own_copy)
    with pytest.raises(ValueError, match=message):
        open_split(str(own_copy), "gnp_shapes", "train", panoptic=True, check=True)


def test_missing_coco_names_the_path_and_the_option(tmp_path):
    with pytest.raises(ValueError, match="coco/train2017' does not exist.*--data-path"):
        open_split(str(tmp_path), "coco", "train", panoptic=False, check=True)


def test_collate():
    assert collate([(1, {"a": 2}), (3, {"a": 4})]) == ([1, 3], [{"a": 2}, {"a": 4}])
