"""Predictions as pictures: labelled segments or boxes over an image, and tiles in one grid.

Images are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

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
    numbers: Sequence[int],
    labels: Sequence[str],
    masks: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """``image`` with boxes (x0, y0, x1, y1 in pixels), and masks if there are any.

    Args:
        numbers: That of the colour of each.
        labels: What to write at each.
        masks: (H, W) bool or 0 and 1 for each box, or none.
    """
    out = image.astype(float)
    for mask, number in zip(masks, numbers, strict=False):
        inside = mask.astype(bool)
        out[inside] = 0.5 * out[inside] + 0.5 * np.array(color_of(number))
    picture = Image.fromarray(out.astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for box, number in zip(boxes, numbers, strict=True):
        canvas.rectangle([float(v) for v in box], outline=color_of(number), width=_line(picture))
    places = [(float(box[0]), float(box[1])) for box in boxes]
    return _write(picture, [(*at, label) for at, label in zip(places, labels, strict=True)])


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


def _line(picture: Image.Image) -> int:
    return max(2, min(picture.size) // 250)


def _write(picture: Image.Image, labels: Sequence[tuple[float, float, str]]) -> np.ndarray:
    canvas, size = ImageDraw.Draw(picture), max(9, min(picture.size) // 40)
    edge = max(1, size // 10)
    for x, y, text in labels:
        canvas.text((x, y), text, "white", font_size=size, stroke_width=edge, stroke_fill="black")
    return np.asarray(picture)
