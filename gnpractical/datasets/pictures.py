"""Predictions as pictures: labelled segments or boxes over an image, and tiles in one grid.

Images are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import colorsys
import logging
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

logger = logging.getLogger(__name__)


def color_of(number: int) -> tuple[int, int, int]:
    """A colour for a category; neighbouring numbers get hues far apart (golden ratio)."""
    rgb = colorsys.hsv_to_rgb(number * 0.61803 % 1.0, 0.75, 0.95)
    return tuple(round(255 * v) for v in rgb)  # type: ignore[return-value]


def draw_segments(
    image: np.ndarray, ids: np.ndarray, segments: Sequence[tuple[int, int, str]], alpha: float = 0.6
) -> np.ndarray:
    """``image`` under a tint and an outline for each segment.

    Args:
        ids: (H, W) segment ids; ids that are not in ``segments`` stay untouched.
        segments: (id, number of the colour, label); "" for no label.
    """
    out = image.astype(float)
    for segment_id, number, _ in segments:
        mask = ids == segment_id
        out[mask] = (1 - alpha) * out[mask] + alpha * np.array(color_of(number))
    edge = np.zeros(ids.shape, dtype=bool)
    edge[1:] |= ids[1:] != ids[:-1]
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    out[edge] = 255
    labels = []
    for segment_id, _, label in segments:
        ys, xs = np.nonzero(ids == segment_id)
        if label and len(xs):
            labels.append((float(np.median(xs)), float(np.median(ys)), label))
    return _write(Image.fromarray(out.astype(np.uint8)), labels)


def draw_boxes(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    min_score: float = 0.5,
) -> np.ndarray:
    """``image`` with the boxes (x0, y0, x1, y1 in pixels) that score more than ``min_score``."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    labels = []
    for box, number, score in zip(boxes, classes, scores, strict=True):
        if score > min_score:
            draw.rectangle([float(v) for v in box], outline=color_of(number), width=2)
            labels.append((float(box[0]), float(box[1]), f"{names[number]} {score:.2f}"))
    return _write(picture, labels)


class PictureGrid:
    """The first pictures of a run, each beside its image, for one PNG."""

    def __init__(self, num_images: int = 12) -> None:
        self._num_images = num_images
        self._tiles: list[np.ndarray] = []

    @property
    def full(self) -> bool:
        return len(self._tiles) >= self._num_images

    def add(self, image: np.ndarray, picture: np.ndarray) -> None:
        self._tiles.append(np.concatenate([image, picture], axis=1))

    def save(self, path: str) -> None:
        """Write the grid, if there is anything in it, and make its folder."""
        if self._tiles:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(tile(self._tiles)).save(path)
            logger.info("Predictions, each beside its image: %s", path)


def tile(images: Sequence[np.ndarray], columns: int = 3, margin: int = 4) -> np.ndarray:
    """Images of any sizes in one grid on white, ``margin`` pixels apart."""
    height = max(i.shape[0] for i in images) + margin
    width = max(i.shape[1] for i in images) + margin
    rows = -(-len(images) // columns)
    grid = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        y, x = k // columns * height, k % columns * width
        grid[y : y + image.shape[0], x : x + image.shape[1]] = image
    return grid


def _write(picture: Image.Image, labels: Sequence[tuple[float, float, str]]) -> np.ndarray:
    draw = ImageDraw.Draw(picture)
    for x, y, text in labels:
        draw.text((x, y), text, fill="white", stroke_width=1, stroke_fill="black", font_size=9)
    return np.asarray(picture)
