import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnpractical.datasets.shapes import make_shapes

TOOL = Path(__file__).parents[2] / "tools" / "prepare_panoptic.py"


def run(*args):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, timeout=120
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("prepare"), {"train": 3, "val": 2})


def test_makes_the_pngs_and_says_how_many(folder, tmp_path):
    done = run("--root", folder, "--output", tmp_path, "--splits", "train", "val")
    assert done.returncode == 0, done.stderr
    assert "panoptic_stuff_train: 3 files written" in done.stdout
    for path in (folder / "panoptic_stuff_train").iterdir():
        again = np.asarray(Image.open(tmp_path / "panoptic_stuff_train" / path.name))
        np.testing.assert_array_equal(again, np.asarray(Image.open(path)))
    again = run("--root", folder, "--output", tmp_path, "--splits", "train", "val")
    assert "panoptic_stuff_train: 0 files written" in again.stdout


def test_missing_annotations_in_one_line(tmp_path):
    done = run("--root", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "annotations/panoptic_train2017.json does not exist" in done.stderr


def test_bad_annotations_in_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    next((tmp_path / "copy" / "panoptic_val").iterdir()).write_bytes(b"no image")
    done = run("--root", tmp_path / "copy", "--output", tmp_path / "out", "--splits", "val")
    assert done.returncode == 1 and "1 of 2 annotations are not usable" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "out" / "panoptic_stuff_val").iterdir())) == 1
