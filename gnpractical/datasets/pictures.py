"""Predictions as pictures: labelled segments or boxes over an image, and tiles in one grid.

Images are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

logger = logging.getLogger(__name__)


def color_of(number: int) -> tuple[int, ...]:
    """A colour for a category; neighbouring numbers get hues far apart (golden ratio)."""
    return ImageColor.getrgb(f"hsv({360 * (number * 0.61803 % 1.0)}, 75%, 95%)")


def draw_segments(
    image: np.ndarray, ids: np.ndarray, segments: Sequence[tuple[int, int, str]]
) -> np.ndarray:
    """``image`` under a tint, an outline and a label for each segment.

    Args:
        ids: (H, W), the id of each pixel's segment. Pixels of other segments get no tint.
        segments: The id, the number of the colour, and the label of each segment.
    """
    out, labels = image.astype(float), []
    for segment_id, number, label in segments:
        mask = ids == segment_id
        out[mask] = 0.4 * out[mask] + 0.6 * np.array(color_of(number))
        ys, xs = np.nonzero(mask)
        if len(xs):
            labels.append((float(np.median(xs)), float(np.median(ys)), label))
    edge = np.zeros(ids.shape, dtype=bool)
    edge[1:] |= ids[1:] != ids[:-1]
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    out[edge] = 255
    return _write(Image.fromarray(out.astype(np.uint8)), labels)


def draw_boxes(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str] | Mapping[int, str],
) -> np.ndarray:
    """``image`` with the boxes (x0, y0, x1, y1 in pixels) that score more than 0.5.

    ``names`` holds the names of the ``classes``.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    labels = []
    for box, number, score in zip(boxes, classes, scores, strict=True):
        if score > 0.5:
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
        """Write them in three columns on white, if there are any, and make the folder."""
        if not self._tiles:
            return
        height = max(tile.shape[0] for tile in self._tiles) + 4
        width = max(tile.shape[1] for tile in self._tiles) + 4
        rows = math.ceil(len(self._tiles) / 3)
        grid = Image.new("RGB", (3 * width, rows * height), "white")
        for k, tile in enumerate(self._tiles):
            grid.paste(Image.fromarray(tile), (k % 3 * width, k // 3 * height))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        grid.save(path)
        logger.info("Predictions, each beside its image: %s", path)


def _write(picture: Image.Image, labels: Sequence[tuple[float, float, str]]) -> np.ndarray:
    draw = ImageDraw.Draw(picture)
    for x, y, text in labels:
        draw.text((x, y), text, fill="white", stroke_width=1, stroke_fill="black", font_size=9)
    return np.asarray(picture)
