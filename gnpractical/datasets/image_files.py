"""Pictures in files, read upright and checked, with errors that name the file."""

from __future__ import annotations

import os
from typing import Any

from PIL import ExifTags, Image

# What turns a picture upright, by its EXIF orientation. ImageOps.exif_transpose would also write
# the other entries anew, and fail on those that it cannot write.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike, upright: bool = True) -> Image.Image:
    """The image in a file, turned by its EXIF entry unless it is not to be ``upright``.

    Raises:
        ValueError: There is none in it. The message names the file.
    """
    check_is_file(path)
    try:
        with Image.open(path) as file:
            turn = _TURNS.get(_orientation(file)) if upright else None
            return file.copy() if turn is None else file.transpose(turn)
    except Exception as e:  # Pillow's decoders raise what they come across
        raise ValueError(f"{path}: not a readable image ({e})") from e


def _orientation(image: Image.Image) -> int:
    """Its EXIF entry; upright, as for Detectron2, where the entries cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def check_is_file(path: str | os.PathLike) -> None:
    """ValueError unless it is one: reading from a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}")


def check_depth(image: Image.Image, path: str) -> None:
    """ValueError unless it has at most 8 bits a channel."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{path}: 16 or 32 bits a pixel, 8 are required; convert the image")


def check_size(image: Image.Image, path: str, entry: dict[str, Any]) -> None:
    """ValueError unless it has the size that its ``entry`` in the annotations says."""
    if image.size != (entry["width"], entry["height"]):
        raise ValueError(
            f"{path} is {image.width}x{image.height} pixels, but {entry['width']}x"
            f"{entry['height']} in the annotations"
        )
