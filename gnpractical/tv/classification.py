"""Images to classify, and a small net for them."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision import transforms as T
from torchvision.datasets import Caltech101, ImageFolder, OxfordIIITPet
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck

from gnpractical.datasets.image_files import check_depth, read_image
from gnpractical.runs.errors import first_line

ARCHS = (
    "bottleneck11",
    "bottleneck20",
    "bottleneck47",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
)
LAYOUT = {
    "pets": "oxford-iiit-pet/images and annotations",
    "caltech101": "caltech101/101_ObjectCategories, BACKGROUND_Google among them",
}
# Of images up to this size a random part of random size, as is usual for larger ones, shows little.
_SMALL = 64


def open_classes(
    dataset: str, root: str, image_size: int
) -> tuple[Dataset, Dataset, int]:  # as torchvision calls the splits: train, val
    """The training set, the test set and the number of classes.

    Args:
        dataset: "pets" or "caltech101", in or to be downloaded into ``root``, or a folder with
            ``train/<class>/`` and ``val/<class>/``.
        image_size: That of the square crops.

    Raises:
        ValueError: The data are not there, or not laid out so. The message says how.
    """
    normalize = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    rgb = methodcaller("convert", "RGB")  # some images of Caltech-101 are grey
    crop = [T.RandomResizedCrop(image_size)]
    resize = image_size * 8 // 7
    if image_size <= _SMALL:
        crop = [T.Resize(image_size), T.RandomCrop(image_size, padding=image_size // 8)]
        resize = image_size
    train = T.Compose([rgb, *crop, T.RandomHorizontalFlip(), *normalize])
    test = T.Compose([rgb, T.Resize(resize), T.CenterCrop(image_size), *normalize])
    try:
        if dataset == "pets":
            train_set = OxfordIIITPet(root, "trainval", transform=train, download=True)
            test_set = OxfordIIITPet(root, "test", transform=test, download=True)
            _check_pets(Path(root, "oxford-iiit-pet", "annotations"), len(train_set.classes))
            return train_set, test_set, len(train_set.classes)
        if dataset == "caltech101":
            sets = [Caltech101(root, transform=t, download=True) for t in (train, test)]
            indices = stratified_split(torch.tensor(sets[0].y), 0.2)
            return *map(Subset, sets, indices), len(sets[0].categories)  # type: ignore[return-value]
        folders = (
            ImageFolder(Path(dataset, "train"), train, loader=_read_rgb),
            ImageFolder(Path(dataset, "val"), test, loader=_read_rgb),
        )
    except (OSError, RuntimeError, ValueError) as e:
        if dataset not in LAYOUT:
            raise ValueError(
                f"--dataset must be one of {', '.join(LAYOUT)}, or a folder with images in "
                f"train/<class>/ and val/<class>/; got {dataset!r} ({first_line(e)})"
            ) from None
        raise ValueError(
            f"--data must hold {dataset} as torchvision lays it out ({LAYOUT[dataset]}), or be a "
            f"folder to download it into, but {root} does not work ({first_line(e)}). Put the "
            f"dataset there or correct --data."
        ) from None
    if len(folders[0].classes) < 2:
        raise ValueError(f"{dataset}: train/ must have at least two classes")
    if folders[0].classes != folders[1].classes:
        odd = sorted(set(folders[0].classes) ^ set(folders[1].classes))
        raise ValueError(
            f"{dataset}: train/ and val/ must have the same classes, but these are in one of them "
            f"only: {', '.join(odd[:5])}"
        )
    return *folders, len(folders[0].classes)


def _read_rgb(path: str) -> Image.Image:
    image = read_image(path)
    check_depth(image, path)
    return image.convert("RGB")


def _check_pets(folder: Path, classes: int) -> None:
    """torchvision counts the names and takes the labels as they are: some breeds alone fail."""
    for path in (folder / "trainval.txt", folder / "test.txt"):
        labels = {int(line.split()[1]) for line in path.read_text().splitlines()}
        if not labels <= set(range(1, classes + 1)):
            raise ValueError(
                f"{path} must have the labels 1 to {classes}, but has {sorted(labels)}"
            )


def build_classifier(
    arch: str, norm_layer: Callable[[int], nn.Module], num_classes: int
) -> nn.Module:
    """A ResNet of torchvision's, or ``"bottleneck20"`` and its like, for images of some 32 pixels.

    These have so many weight layers: a 3x3 stem of stride 2, three stages of one, two or five
    bottlenecks with 64, 128 and 256 channels, and the classifier.
    """
    if not arch.startswith("bottleneck"):
        return get_model(arch, norm_layer=norm_layer, num_classes=num_classes)
    width = 32
    layers = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), norm_layer(width), nn.ReLU()]
    for planes in (16, 32, 64):
        for block in range((int(arch.removeprefix("bottleneck")) - 2) // 9):
            stride = 2 if planes > 16 and block == 0 else 1
            shortcut = None
            if block == 0:
                conv = nn.Conv2d(width, 4 * planes, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, norm_layer(4 * planes))
            layers.append(Bottleneck(width, planes, stride, shortcut, norm_layer=norm_layer))
            width = 4 * planes
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )


def stratified_split(labels: Tensor, test_share: float) -> tuple[list[int], list[int]]:
    """Return indices for training and for the test, always the same share of every class."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique():
        (index,) = torch.where(labels == label)
        index = index[torch.randperm(len(index), generator=generator)]
        count = round(len(index) * test_share)
        test += index[:count].tolist()
        train += index[count:].tolist()
    return train, test
