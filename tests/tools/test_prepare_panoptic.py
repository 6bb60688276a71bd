import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from gnpractical.datasets.shapes import make_shapes

TOOL = Path(__file__).parents[2] / "tools" / "prepare_panoptic.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("prepare"), {"train": 3, "val": 2})


def test_makes_the_pngs_and_says_how_many(folder, tmp_path):
    command = [sys.executable, TOOL, "--root", folder, "--output", tmp_path]
    command += ["--splits", "train", "val"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "panoptic_stuff_train: 3 files written" in done.stdout
    for path in (folder / "panoptic_stuff_train").iterdir():
        again = np.asarray(Image.open(tmp_path / "panoptic_stuff_train" / path.name))
        np.testing.assert_array_equal(again, np.asarray(Image.open(path)))


def test_missing_annotations_in_one_line(tmp_path, error_of):
    expected = "annotations/panoptic_train2017.json does not exist"
    assert expected in error_of(TOOL, "--root", tmp_path)


def test_bad_annotations_in_one_line(folder, tmp_path, error_of):
    shutil.copytree(folder, tmp_path / "copy")
    next((tmp_path / "copy" / "panoptic_val").iterdir()).write_bytes(b"no image")
    args = ["--root", tmp_path / "copy", "--output", tmp_path / "out", "--splits", "val"]
    assert "1 of 2 annotations are not usable" in error_of(TOOL, *args)
    assert len(list((tmp_path / "out" / "panoptic_stuff_val").iterdir())) == 1


def test_a_png_turned_round(folder, tmp_path, error_of):
    shutil.copytree(folder, tmp_path / "copy")
    path = next((tmp_path / "copy" / "panoptic_val").iterdir())
    ImageOps.mirror(Image.open(path)).save(path)
    line = error_of(TOOL, "--root", tmp_path / "copy", "--splits", "val")
    assert f"{path.name}: segment " in line and "in the PNG, but the bbox [" in line


@pytest.mark.parametrize(
    "names, expected",
    [
        (["000001.png", "000001.png"], "file_name used twice in 'annotations': 1 of 2"),
        (["../panoptic_val/000001.png", "000002.png"], "must be below the folder of the PNGs"),
    ],
)
def test_file_names_that_lead_elsewhere(folder, tmp_path, error_of, names, expected):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "annotations" / "panoptic_val.json"
    data = json.loads(path.read_text())
    for annotation, name in zip(data["annotations"], names, strict=True):
        annotation["file_name"] = name
    path.write_text(json.dumps(data))
    args = ["--root", tmp_path / "copy", "--output", tmp_path / "out", "--splits", "val"]
    assert expected in error_of(TOOL, *args)


def test_file_names_with_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    pngs, path = tmp_path / "copy" / "panoptic_val", tmp_path / "copy/annotations/panoptic_val.json"
    data = json.loads(path.read_text())
    (pngs / "a").mkdir()
    for annotation in data["annotations"]:
        (pngs / annotation["file_name"]).rename(pngs / "a" / annotation["file_name"])
        annotation["file_name"] = f"a/{annotation['file_name']}"
    path.write_text(json.dumps(data))
    command = [sys.executable, TOOL, "--root", tmp_path / "copy", "--output", tmp_path / "out"]
    done = subprocess.run([*command, "--splits", "val"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "panoptic_stuff_val" / "a").iterdir())) == 2
