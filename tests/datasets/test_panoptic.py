import json
import math

import numpy as np
import pytest
from PIL import Image

from gnpractical.datasets.panoptic import (
    id_to_rgb,
    panoptic_quality,
    panoptic_to_semantic,
    prepare_semantic,
    rgb_to_id,
    semantic_labels,
)

CATEGORIES = [
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 2, "name": "dog", "isthing": 1},
    {"id": 92, "name": "sea", "isthing": 0},
    {"id": 100, "name": "wall", "isthing": 0},
]


def write(folder, name, images):
    """``images``: [(ids (H, W), {segment id: (category, iscrowd)})], as COCO panoptic files."""
    (folder / name).mkdir()
    annotations = []
    for i, (ids, segments) in enumerate(images):
        Image.fromarray(id_to_rgb(ids)).save(folder / name / f"{i}.png")
        annotations.append(
            {
                "image_id": i,
                "file_name": f"{i}.png",
                "segments_info": [
                    {
                        "id": s,
                        "category_id": category,
                        "iscrowd": crowd,
                        "area": int((ids == s).sum()),
                    }
                    for s, (category, crowd) in segments.items()
                ],
            }
        )
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i} for i in range(len(images))],
                "annotations": annotations,
                "categories": CATEGORIES,
            }
        )
    )
    return path, folder / name


def quality(tmp_path, gt, pred):
    return panoptic_quality(*write(tmp_path, "gt", gt), *write(tmp_path, "pred", pred))


def halves(left, right, height=10, width=20):
    ids = np.full((height, width), right, dtype=np.uint32)
    ids[:, : width // 2] = left
    return ids


def test_ids_and_rgb_are_inverse():
    ids = np.array([[0, 1, 255], [256, 70001, 2**24 - 1]])
    np.testing.assert_array_equal(rgb_to_id(id_to_rgb(ids)), ids)


def test_perfect_prediction(tmp_path):
    image = (halves(7, 300), {7: (1, 0), 300: (92, 0)})
    result = quality(tmp_path, [image], [image])
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 2}
    assert result["Things"]["n"] == result["Stuff"]["n"] == 1


def test_hand_computed(tmp_path):
    gt = halves(1, 2)  # 100 pixels of cat, 100 of sea
    pred = gt.copy()
    pred[:2, :10] = 2  # cat 80; sea 120: IoU 80/100 and 100/120
    result = quality(
        tmp_path, [(gt, {1: (1, 0), 2: (92, 0)})], [(pred, {1: (1, 0), 2: (92, 0)})]
    )  # fmt: skip
    assert result["Things"]["pq"] == pytest.approx(0.8)
    assert result["Stuff"]["pq"] == pytest.approx(100 / 120)
    assert result["All"]["pq"] == pytest.approx((0.8 + 100 / 120) / 2)


def test_wrong_category_is_a_false_positive_and_a_false_negative(tmp_path):
    gt = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    pred = (halves(1, 2), {1: (2, 0), 2: (92, 0)})
    result = quality(tmp_path, [gt], [pred])
    assert result["Things"] == {"pq": 0, "sq": 0, "rq": 0, "n": 2}  # cat missed, dog invented
    assert result["Stuff"]["pq"] == 1


def test_half_on_half_off_is_no_match(tmp_path):
    gt, pred = halves(1, 0, width=30), halves(1, 0, width=20)
    pred = np.concatenate([np.zeros((10, 5), np.uint32), pred], axis=1)[:, :30]
    pred = np.pad(pred, ((0, 0), (0, 30 - pred.shape[1])))
    gt[gt == 0] = 2
    result = quality(
        tmp_path, [(gt, {1: (1, 0), 2: (92, 0)})], [(pred, {1: (1, 0)})]
    )  # fmt: skip
    # intersection 100, union 150: IoU 2/3
    assert result["Things"]["sq"] == pytest.approx(2 / 3)
    assert result["Stuff"]["pq"] == 0


def test_void_in_the_union_does_not_count(tmp_path):
    gt = halves(1, 0)  # right half unlabelled
    pred = np.full((10, 20), 5, np.uint32)
    result = quality(tmp_path, [(gt, {1: (1, 0)})], [(pred, {5: (1, 0)})])
    assert result["Things"]["pq"] == 1


def test_prediction_mostly_on_void_is_not_false(tmp_path):
    gt = halves(1, 0)
    pred = halves(1, 9)
    result = quality(tmp_path, [(gt, {1: (1, 0)})], [(pred, {1: (1, 0), 9: (2, 0)})])
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}


def test_prediction_on_a_crowd_of_its_category_is_not_false(tmp_path):
    gt = (halves(1, 2), {1: (1, 1), 2: (92, 0)})
    same = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    other = (halves(1, 2), {1: (2, 0), 2: (92, 0)})
    assert quality(tmp_path, [gt], [same])["Things"]["n"] == 0
    assert math.isnan(quality_things_pq(tmp_path, gt, same))
    (tmp_path / "b").mkdir()
    assert quality(tmp_path / "b", [gt], [other])["Things"] == {"pq": 0, "sq": 0, "rq": 0, "n": 1}


def quality_things_pq(tmp_path, gt, pred):
    (tmp_path / "nan").mkdir()
    return quality(tmp_path / "nan", [gt], [pred])["Things"]["pq"]


def test_many_images_in_parallel_equal_the_sum(tmp_path):
    good = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    bad = (halves(2, 1), {1: (1, 0), 2: (92, 0)})
    result = quality(tmp_path, [good] * 6, [good, bad, good, good, bad, bad])
    # cat: 3 matches, 3 false positives, 3 false negatives
    assert result["Things"]["rq"] == pytest.approx(3 / (3 + 1.5 + 1.5))


def test_image_without_prediction(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match=r"no prediction for 1 of 2 images.*\[1\]"):
        quality(tmp_path, [image, image], [image])


@pytest.mark.parametrize(
    "segments, message",
    [
        ({1: (1, 0)}, r"only in the PNG \[2\]"),
        ({1: (1, 0), 2: (92, 0), 3: (1, 0)}, r"only in the JSON \[3\]"),
        ({1: (1, 0), 2: (55, 0)}, r"unknown category ids \[55\]"),
    ],
)
def test_json_and_png_that_disagree(tmp_path, segments, message):
    gt = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match=message):
        quality(tmp_path, [gt], [(halves(1, 2), segments)])


def test_prediction_of_another_size(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    small = (halves(1, 2, width=10), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match=r"\(10, 10\) predicted for an image of \(10, 20\)"):
        quality(tmp_path, [image], [small])


def test_unreadable_files(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    gt, pred = write(tmp_path, "gt", [image]), write(tmp_path, "pred", [image])
    (pred[1] / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0.png: not a readable panoptic PNG"):
        panoptic_quality(*gt, *pred)
    pred[0].write_text("{")
    with pytest.raises(ValueError, match="pred.json: not a readable JSON"):
        panoptic_quality(*gt, *pred)


def test_semantic_labels_things_share_zero_and_stuff_counts_from_one():
    assert semantic_labels(CATEGORIES) == {1: 0, 2: 0, 92: 1, 100: 2}


def test_semantic_of_panoptic():
    ids = np.array([[0, 5], [6, 70001]])
    segments = [{"id": 5, "category_id": 1}, {"id": 6, "category_id": 100},
                {"id": 70001, "category_id": 92}]  # fmt: skip
    out = panoptic_to_semantic(ids, segments, semantic_labels(CATEGORIES))
    np.testing.assert_array_equal(out, [[255, 0], [2, 1]])
    assert out.dtype == np.uint8


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


def test_prepare_refuses_ids_that_the_json_lacks_but_writes_the_rest(tmp_path):
    good = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    bad = (halves(1, 2), {1: (1, 0)})
    json_path, folder = write(tmp_path, "gt", [bad, good])
    with pytest.raises(ValueError, match=r"1 of 2 annotations.*0.png: ids in the PNG.*\[2\]"):
        prepare_semantic(json_path, folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["1.png"]
