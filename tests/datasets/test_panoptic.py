import json
import math
import os
import struct
import time

import numpy as np
import pytest
from helpers.panoptic_files import CATEGORIES, halves, write
from PIL import ExifTags, Image, ImageOps

from gnpractical.datasets.image_files import read_image
from gnpractical.datasets.panoptic import (
    id_to_rgb,
    panoptic_to_semantic,
    prepare_semantic,
    read_ids,
    read_json,
    rgb_to_id,
    semantic_labels,
)


def test_ids_and_rgb_are_inverse():
    ids = np.array([[0, 1, 255], [256, 70001, 2**24 - 1]])
    np.testing.assert_array_equal(rgb_to_id(id_to_rgb(ids)), ids)


def test_semantic_labels_things_share_zero_and_stuff_counts_from_one():
    assert semantic_labels(CATEGORIES) == {1: 0, 2: 0, 92: 1, 100: 2}


def test_semantic_of_panoptic():
    ids = np.array([[0, 5], [6, 70001]])
    segments = [
        {"id": 5, "category_id": 1},
        {"id": 6, "category_id": 100},
        {"id": 70001, "category_id": 92},
    ]
    out = panoptic_to_semantic(ids, segments, semantic_labels(CATEGORIES))
    np.testing.assert_array_equal(out, [[255, 0], [2, 1]])
    assert out.dtype == np.uint8


@pytest.mark.parametrize(
    "box, error",
    [
        (None, ""),
        ([], ""),
        ([0, 0, 10, 10], ""),
        ([0.4, 0, 9, 11], ""),  # rounded, or up to the last pixel
        ([0, 0, 8, 10], ""),  # two pixels, in small images more than 5%
        ([0, 0, 20, 10], ""),  # the whole image
        ([10, 0, 10, 10], "segment 1 has the box [0, 0, 10, 10] in the PNG, but the bbox [10, 0,"),
        ([0, 0, 10], "but the bbox [0, 0, 10] in the JSON"),
        (["a"] * 4, "but the bbox ['a', "),
        ([0, 0, math.nan, 10], "but the bbox [0, 0, nan, 10]"),
    ],
)
def test_boxes_are_compared_with_the_png(box, error):
    segments = [{"id": 1, "category_id": 1, "bbox": box}, {"id": 2, "category_id": 92}]
    segments.append({"id": 7, "category_id": 92, "bbox": [0, 0, 5, 5]})  # of no pixel
    try:
        panoptic_to_semantic(halves(1, 2), segments, semantic_labels(CATEGORIES))
        assert not error
    except ValueError as e:
        assert error and error in str(e)


def test_pictures_of_odd_exif_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 8)
    # The resolution's unit as a fraction, which Pillow reads, but cannot write.
    unit = b"\x28\x01\x0b\x00\x01\x00\x00\x00\x00\x00\x00\x40"
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    tiff = b"II*\x00\x08\x00\x00\x00\x02\x00" + entry + unit + b"\x00" * 4
    Image.new("RGB", (8, 4)).save(tmp_path / "b.jpg", exif=b"Exif\x00\x00" + tiff)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "b.jpg"))
    assert read_image(tmp_path / "b.jpg").size == (4, 8)
    Image.new("RGB", (8, 4)).save(tmp_path / "ids.png", exif=exif)
    assert read_ids(tmp_path / "ids.png").shape == (4, 8)  # as other programs read panoptic PNGs
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
        picture.save(tmp_path / "c.png", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(tmp_path / "c.png"))
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "c.png")), wanted)


def test_prepare_writes_all_and_resumes(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    json_path, folder = write(tmp_path, "gt", [image] * 3)
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 3
    expected = halves(0, 1)
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/{i}.png")), expected)
    (tmp_path / "out/1.png").unlink()
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]


def test_prepare_makes_anew_what_is_older_than_the_annotations(tmp_path):
    json_path, folder = write(tmp_path, "gt", [(halves(1, 2), {1: (1, 0), 2: (92, 0)})] * 2)
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 2
    time.sleep(0.01)
    Image.open(folder / "1.png").save(folder / "1.png")
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 1
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 0
    time.sleep(0.01)
    json_path.write_text(json_path.read_text().replace('"category_id": 92', '"category_id": 100'))
    os.utime(json_path, (1, 1))  # as of an archive
    assert prepare_semantic(json_path, folder, tmp_path / "out") == 2
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/0.png")), halves(0, 2))


def test_prepare_makes_empty_files_again_and_refuses_other_sizes(tmp_path):
    json_file, pngs = write(tmp_path, "gt", [(halves(1, 2), {1: (1, 0), 2: (92, 0)})])
    out = tmp_path / "semantic"
    assert prepare_semantic(json_file, pngs, out) == 1
    (png,) = out.iterdir()
    png.write_bytes(b"")
    (out / ".left.png.part").write_bytes(b"half")
    assert prepare_semantic(json_file, pngs, out) == 1
    assert png.stat().st_size > 0 and list(out.iterdir()) == [png]
    data = json.loads(json_file.read_text())
    data["images"][0] |= {"height": 11, "width": 20}
    json_file.write_text(json.dumps(data))
    png.unlink()
    with pytest.raises(ValueError, match=r"\(10, 20\) pixels, but \(11, 20\)"):
        prepare_semantic(json_file, pngs, out)
    with pytest.raises(ValueError, match="isthing must be 0 or 1"):
        semantic_labels([{"id": 3, "isthing": 2}])


def test_prepare_refuses_ids_that_the_json_lacks_but_writes_the_rest(tmp_path):
    good = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    bad = (halves(1, 2), {1: (1, 0)})
    json_path, folder = write(tmp_path, "gt", [bad, good])
    with pytest.raises(ValueError, match=r"1 of 2 annotations.*0.png: ids in the PNG.*\[2\]"):
        prepare_semantic(json_path, folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["1.png"]


@pytest.mark.parametrize("text", ["3", "[1]", "null", '"x"', "[" * 100_000, "{"])
def test_json_files_that_hold_no_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json(: not a readable JSON| must hold a JSON object)"):
        read_json(tmp_path / "a.json")
