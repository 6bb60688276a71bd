"""gnp_shapes: a small panoptic data set drawn from a seed, in COCO's formats on disk.

Four thing classes (disc, box, triangle, star) lie over four stuff classes (sky, grass, water,
sand). Each class has a typical colour from which instances stray so far that the classes overlap:
a model has to learn shape and texture too, under uneven light and sensor noise. Things overlap
each other, are 14 to 56 pixels wide, and in some images a swarm of tiny ones is a crowd.

    <root>/gnp_shapes/
        annotations/instances_{train,val}.json   polygons of what is visible, RLE for crowds
        annotations/panoptic_{train,val}.json
        {train,val}/*.jpg
        panoptic_{train,val}/*.png
        panoptic_stuff_{train,val}/*.png         semantic PNGs for Panoptic FPN
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from filelock import FileLock
from PIL import Image, ImageDraw
from tqdm.contrib.concurrent import thread_map

from gnpractical.datasets.coco_files import split_files
from gnpractical.datasets.panoptic import id_to_rgb, prepare_semantic
from gnpractical.datasets.polygons import mask_to_polygons

THINGS = ("disc", "box", "triangle", "star")
STUFF = ("sky", "grass", "water", "sand")
CATEGORIES = [
    {"id": i + 1, "name": name, "supercategory": "gnp_shapes", "isthing": int(name in THINGS)}
    for i, name in enumerate(THINGS + STUFF)
]
NUM_IMAGES = {"train": 512, "val": 100}
HEIGHT, WIDTH = 120, 160

FOLDER = "gnp_shapes"
_COLOR = {
    "disc": (205, 75, 70),
    "box": (70, 90, 205),
    "triangle": (220, 190, 60),
    "star": (175, 70, 190),
    "sky": (150, 185, 225),
    "grass": (95, 150, 75),
    "water": (60, 120, 150),
    "sand": (205, 180, 135),
}
_COLOR_SPREAD = 17  # standard deviation of each channel
# What is less visible than this is left unlabelled (void): in pixels, and of a thing's own area.
_MIN_PIXELS, _MIN_SHARE = 24, 0.4


def make_shapes(
    root: str | os.PathLike, num_images: dict[str, int] | None = None, seed: int = 0
) -> Path:
    """Make the data set under ``root`` unless it is there, and return its folder.

    It is made in a folder beside its place and renamed when complete, by one process at a time, so
    that an interrupted or a simultaneous run never leaves, or meets, half of it.

    Raises:
        OSError: ``root`` cannot be written.
    """
    folder = Path(root) / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{FOLDER}.part")
    with FileLock(folder.with_name(f".{FOLDER}.lock")):
        if not folder.is_dir():  # nor has another process made it meanwhile
            shutil.rmtree(part, ignore_errors=True)  # of one that was killed
            part.mkdir()
            try:
                for split, count in (num_images or NUM_IMAGES).items():
                    _make_split(part, split, count, seed)
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def draw_image(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image and its segments, the same for the same arguments.

    Returns:
        The image, (HEIGHT, WIDTH, 3) uint8, and a dict for each segment with the ``name`` of its
        category, ``iscrowd``, and the ``mask`` (HEIGHT, WIDTH) bool of what is visible. Masks do
        not overlap.
    """
    rng = np.random.default_rng([seed, int(split == "train"), index])
    image, stuff = _background(rng)
    owner = np.full((HEIGHT, WIDTH), -1)  # index of the topmost thing
    things: list[tuple[str, int, int]] = []  # name, iscrowd, least number of visible pixels
    if rng.random() < 0.2:
        name = str(rng.choice(THINGS))
        center = rng.uniform([20, 20], [WIDTH - 20, HEIGHT - 20])
        for _ in range(int(rng.integers(9, 15))):
            offset = rng.normal(0, 9, size=2)
            outline = _outline(rng, name, center + offset, rng.uniform(2.5, 4))
            owner[_paint(rng, image, name, outline)] = 0
        things.append((name, 1, _MIN_PIXELS))
    # Small ones lie in front, or too many would be hidden.
    for radius in sorted(rng.uniform(10, 28, rng.integers(2, 6)), reverse=True):
        name = str(rng.choice(THINGS))
        center = rng.uniform([4, 4], [WIDTH - 4, HEIGHT - 4])
        mask = _paint(rng, image, name, _outline(rng, name, center, radius))
        owner[mask] = len(things)
        things.append((name, 0, max(_MIN_PIXELS, int(_MIN_SHARE * mask.sum()))))

    left, right = rng.uniform(0.75, 1.2, 2)
    light = np.linspace(left, right, WIDTH)[None, :, None]
    image = image * light + rng.normal(0, rng.uniform(2, 6), image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)

    segments = [
        {"name": name, "iscrowd": iscrowd, "mask": owner == i}
        for i, (name, iscrowd, least) in enumerate(things)
        if (owner == i).sum() >= least
    ]
    segments += [
        {"name": name, "iscrowd": 0, "mask": (stuff == i) & (owner < 0)}
        for i, name in enumerate(STUFF)
    ]
    return image, [s for s in segments if s["mask"].sum() >= _MIN_PIXELS]


def _make_split(folder: Path, split: str, count: int, seed: int) -> None:
    files = split_files(str(folder), split)
    images_dir, panoptic_dir = Path(files["image_root"]), Path(files["panoptic_root"])
    for path in (images_dir, panoptic_dir, folder / "annotations"):
        path.mkdir(exist_ok=True)

    def make(index: int) -> tuple[dict, list[dict], dict]:
        pixels, segments = draw_image(split, index, seed)
        image_id = index + 1
        stem = f"{image_id:06d}"
        Image.fromarray(pixels).save(images_dir / f"{stem}.jpg", quality=95)
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
        instances, infos = [], []
        for k, segment in enumerate(segments):
            # Spread over all three channels of the PNG, as COCO's ids are.
            segment_id = (k + 1) * 70001
            ids[segment["mask"]] = segment_id
            info = _segment_info(segment, segment_id)
            infos.append(info)
            if segment["name"] in THINGS:
                instances.append(_instance(segment, info, image_id, number=index * 64 + k + 1))
        Image.fromarray(id_to_rgb(ids)).save(panoptic_dir / f"{stem}.png")
        image = {"id": image_id, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH}
        panoptic = {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": infos}
        return image, instances, panoptic

    made = thread_map(make, range(count), desc=f"gnp_shapes {split}", leave=False, disable=None)
    info = {"description": "gnp_shapes", "version": "1", "seed": seed}
    images = [image for image, _, _ in made]
    for key, entries, categories in [
        ("json_file", [i for _, row, _ in made for i in row], CATEGORIES[: len(THINGS)]),
        ("panoptic_json", [p for _, _, p in made], CATEGORIES),
    ]:
        data = {"info": info, "images": images, "annotations": entries, "categories": categories}
        Path(files[key]).write_text(json.dumps(data))
    prepare_semantic(files["panoptic_json"], files["panoptic_root"], files["sem_seg_root"])


def _segment_info(segment: dict, segment_id: int) -> dict[str, Any]:
    ys, xs = np.nonzero(segment["mask"])
    x, y = int(xs.min()), int(ys.min())
    return {
        "id": segment_id,
        "category_id": 1 + (THINGS + STUFF).index(segment["name"]),
        "area": len(xs),
        "bbox": [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
        "iscrowd": segment["iscrowd"],
    }


def _instance(segment: dict, info: dict, image_id: int, number: int) -> dict[str, Any]:
    if segment["iscrowd"]:
        rle = coco_mask.encode(np.asfortranarray(segment["mask"].astype(np.uint8)))
        segmentation: Any = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    else:
        segmentation = mask_to_polygons(segment["mask"])
    return info | {"id": number, "image_id": image_id, "segmentation": segmentation}


def _background(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) float of two or three stuff regions, and the index of each pixel's."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    kinds = rng.permutation(len(STUFF))[: rng.integers(2, 4)]
    borders = np.sort(rng.uniform(0.2, 0.85, len(kinds) - 1)) * HEIGHT
    region = np.zeros((HEIGHT, WIDTH), dtype=int)
    for border in borders:
        wave = rng.uniform(2, 10) * np.sin(x / rng.uniform(12, 40) + rng.uniform(0, 6))
        region += y > border + rng.uniform(-0.25, 0.25) * (x - WIDTH / 2) + wave
    stuff = kinds[region]
    image = np.zeros((HEIGHT, WIDTH, 3))
    for kind in kinds:
        texture = _stuff_texture(rng, STUFF[kind], y, x)
        image[stuff == kind] = (_color(rng, STUFF[kind]) + texture[..., None])[stuff == kind]
    return image, stuff


def _stuff_texture(rng: np.random.Generator, name: str, y: np.ndarray, x: np.ndarray):
    """Brightness offsets (H, W) by which a stuff class can be told, whatever its colour."""
    phase = rng.uniform(0, 2 * math.pi, 3)
    if name == "sky":  # smooth
        return 12 * np.sin(y / 30 + phase[0]) + 8 * np.sin(x / 25 + phase[1])
    if name == "grass":  # upright blades
        blades = np.sin(x * rng.uniform(1.3, 1.7) + 1.5 * np.sin(y / 3 + phase[0]) + phase[1])
        return 11 * blades + rng.normal(0, 4, x.shape)
    if name == "water":  # level ripples
        return 11 * np.sin(y * rng.uniform(0.8, 1.2) + 1.2 * np.sin(x / 9 + phase[0]) + phase[1])
    assert name == "sand"  # coarse grain
    grain = rng.normal(0, 11, (HEIGHT // 2 + 1, WIDTH // 2 + 1))
    return np.kron(grain, np.ones((2, 2)))[:HEIGHT, :WIDTH]


def _outline(rng: np.random.Generator, name: str, center: np.ndarray, radius: float) -> Image.Image:
    """The mask of one thing as an 8-bit image: 255 inside."""
    canvas = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(canvas)
    stretch = rng.uniform(0.85, 1.0)
    turn = rng.uniform(-0.15, 0.15)
    corners = {"disc": 40, "box": 4, "triangle": 3, "star": 10}[name]
    # The first corner is at the top; a box stands on an edge.
    start = -math.pi / 4 if name == "box" else -math.pi / 2
    angles = start + 2 * math.pi * np.arange(corners) / corners
    radii = radius * np.where(np.arange(corners) % 2, 0.45 if name == "star" else 1.0, 1.0)
    local = np.stack([radii * np.cos(angles), stretch * radii * np.sin(angles)])
    rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    draw.polygon([(float(px), float(py)) for px, py in (rotate @ local).T + center], fill=255)
    return canvas


def _paint(
    rng: np.random.Generator, image: np.ndarray, name: str, outline: Image.Image
) -> np.ndarray:
    """Fill ``outline`` in ``image`` with a colour and stripes of its own; returns its mask."""
    mask = np.asarray(outline) > 0
    ys, xs = np.nonzero(mask)
    direction = rng.uniform(0, math.pi)
    across = xs * math.cos(direction) + ys * math.sin(direction)
    stripes = rng.uniform(0, 7) * np.sin(across * rng.uniform(0.3, 1.0))
    image[mask] = _color(rng, name) + stripes[:, None]
    return mask


def _color(rng: np.random.Generator, name: str) -> np.ndarray:
    return np.clip(rng.normal(_COLOR[name], _COLOR_SPREAD), 20, 235)
