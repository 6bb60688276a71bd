import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed")

from gnpractical import convert
from gnpractical.layers import find_pairs
from gnpractical.tv.classification import build_classifier, open_classes, stratified_split


def test_a_split_takes_its_share_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 5)
    train, test = stratified_split(labels, 0.2)
    assert sorted(train + test) == list(range(35))
    assert labels[test].bincount().tolist() == [2, 4, 1]
    assert (train, test) == stratified_split(labels, 0.2)


def write_folder(root, classes, size=(40, 30)):
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize("image_size", [32, 80])
def test_a_folder_of_images(tmp_path, image_size):
    write_folder(tmp_path / "train", ["cat", "dog"])
    write_folder(tmp_path / "val", ["cat", "dog"])
    train, test, num_classes = open_classes(str(tmp_path), "datasets", image_size)
    assert (len(train), len(test), num_classes) == (4, 4, 2)
    for image, label in (train[3], test[3]):
        assert image.shape == (3, image_size, image_size) and label == 1


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="one of pets, caltech101, or a folder with images in"):
        open_classes(str(tmp_path), "datasets", 32)
    write_folder(tmp_path / "train", ["cat", "dog"])
    write_folder(tmp_path / "val", ["cat", "dogs"])
    with pytest.raises(ValueError, match="the same classes, .*: dog, dogs"):
        open_classes(str(tmp_path), "datasets", 32)


def test_the_net_for_small_images():
    model = build_classifier("bottleneck20", nn.BatchNorm2d, 10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    on_the_way = [n for n, m in model.named_modules() if m in layers and "downsample" not in n]
    assert len(on_the_way) == 20
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    rows = convert(model, torch.randn(1, 3, 32, 32)).norms
    assert len(rows) == len(find_pairs(model)) == 22
    assert not any(row.skipped_reason or row.limited_from for row in rows)


def test_pets_of_some_breeds_alone(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split in ("trainval", "test"):
        (folder / "annotations" / f"{split}.txt").write_text("Beagle_1 1 2 1\nPug_1 7 2 2\n")
    with pytest.raises(ValueError, match=r"must have the labels 1 to 2, but has \[1, 7\]"):
        open_classes("pets", str(tmp_path), 32)


def test_pictures_and_classes_that_cannot_be_told_apart(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split, ["cat"])
    with pytest.raises(ValueError, match="at least two classes"):
        open_classes(str(tmp_path), "datasets", 32)
    for split in ("train", "val"):
        write_folder(tmp_path / split, ["dog"])
    train, _, _ = open_classes(str(tmp_path), "datasets", 32)
    Image.new("I;16", (40, 30), 40000).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"0.png: 16 or 32 bits a pixel"):
        train[0]
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.png: not a readable image"):
        train[0]
