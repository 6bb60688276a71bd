"""A user's own pictures: which files are meant, as pixels, and where what is made of them goes."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gnpractical.datasets.image_files import read_image

logger = logging.getLogger(__name__)

_MAX_RATIO = 200  # of the sides


def find_images(inputs: Sequence[str], output: Path, run_file: str) -> list[Path]:
    """The files that ``inputs`` mean, each once, sorted; none of what is below ``output``.

    Args:
        inputs: Files, folders (of which the pictures in them, by their suffix, are meant, in
            subfolders too) and patterns such as ``photos/*.jpg``.
        run_file: What lies in folders of runs, whose pictures are predictions and are left out with
            a warning, unless the folder is one of ``inputs``.

    Raises:
        ValueError: One of them means no file, or all files are below ``output``.
    """
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: set[Path] = set()
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            # Pipes and dangling links are among them, to be named where they are read.
            files = [f for f in path.rglob("*") if f.suffix.lower() in suffixes and not f.is_dir()]
            runs = {f.parent for f in path.rglob(run_file)} - {path}
            of_runs = {f for f in files if not runs.isdisjoint(f.parents)}
            if of_runs:
                logger.warning(
                    "%s: %d pictures in folders of runs are left out", path, len(of_runs)
                )
            files = [f for f in files if f not in of_runs]
            but = "; those of runs are taken when their own folder is named" if of_runs else ""
            missing = f"--input {text!r}: there is no picture in this folder{but}"
        else:
            files = [path] if path.is_file() else [Path(f) for f in glob.glob(text, recursive=True)]
            files = [f for f in files if not f.is_dir()]  # dangling links are named by the reader
            missing = (
                f"--input {text!r}: there is no such file or folder, nor a file of this pattern"
            )
        if not files:
            raise ValueError(missing)
        found.update(Path(os.path.abspath(f)) for f in files)
    written = Path(os.path.realpath(output))  # links may lead there
    outside = [path for path in found if written not in Path(os.path.realpath(path)).parents]
    if not outside:
        raise ValueError(f"--output {str(output)!r} holds all of --input: take another folder")
    return sorted(outside)


def output_names(paths: Sequence[Path], suffix: str) -> list[str]:
    """A name below an output folder for what is made of each of ``paths``, no name twice.

    It is the path below the folder that all have in common, with ``suffix`` in place of its own, or
    behind it where another file or folder would have that name.
    """
    common = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(common) for path in paths]
    taken = Counter(name.with_suffix(suffix) for name in names)
    taken.update(name.with_name(name.name + suffix) for name in names)
    taken.update({folder for name in names for folder in name.parents})
    return [
        str(short if taken[short := name.with_suffix(suffix)] == 1 else f"{name}{suffix}")
        for name in names
    ]


def read_pixels(path: Path) -> np.ndarray:
    """Upright RGB pixels (H, W, 3) uint8 of a picture of any mode.

    16-bit gray keeps its higher byte. Transparency is left out, as in training.

    Raises:
        ValueError: It is no picture, has more than 16 bits a pixel, or is very narrow. The message
            names it.
    """
    image = read_image(path)
    if max(image.size) > _MAX_RATIO * min(image.size):  # of which resizing may leave nothing
        raise ValueError(f"{path}: {image.width}x{image.height} pixels, too narrow")
    if image.mode.startswith("I"):  # Pillow reads 16-bit gray as 16 or 32 bits
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{path}: 32 bits a pixel, 8 or 16 are required; convert the picture")
        if image.mode != "I" or pixels.max() > 255:
            pixels = pixels >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point pixels, 8 or 16 bits are required; convert it")
    return np.array(image.convert("RGB"))
