"""Panoptic quality, against a slow reference and by hand."""

import json
import math

import numpy as np
import pytest
from helpers.panoptic_files import CATEGORIES, halves, write
from PIL import Image

from gnpractical.datasets.panoptic import (
    panoptic_quality,
)


def quality(tmp_path, gt, pred):
    return panoptic_quality(*write(tmp_path, "gt", gt), *write(tmp_path, "pred", pred))


def compare(category, gt, prediction):
    """Of one category in one image: the IoUs of the matches, and how many segments were missed,
    false, and excused as COCO excuses them.
    """
    (gt_ids, gt_segments), (pred_ids, pred_segments) = gt, prediction
    void = gt_ids == 0
    truths, excuse = [], void
    for segment, (other, crowd) in gt_segments.items():
        if other == category and crowd:
            excuse = void | (gt_ids == segment)  # of several crowds the last one counts
        elif other == category:
            truths.append(gt_ids == segment)
    ious, false, excused = [], 0, 0
    for segment, (other, _) in pred_segments.items():
        if other != category:
            continue
        mask = pred_ids == segment
        overlaps = [(mask & truth).sum() / ((mask & ~void) | truth).sum() for truth in truths]
        if max(overlaps, default=0) > 0.5:
            ious.append(max(overlaps))
        elif (mask & excuse).sum() / mask.sum() > 0.5:
            excused += 1
        else:
            false += 1
    return ious, len(truths) - len(ious), false, excused


def reference(images):
    """Panoptic quality, segment by segment as Eq. (1) of arXiv 1801.00868 has it; slow.

    Args:
        images: [(ground truth, prediction)], each as in :func:`write`.

    Returns:
        As ``panoptic_quality``, and how many segments were matched, missed, false and excused.
    """
    rows, counts = {}, np.zeros(4, int)
    for category in CATEGORIES:
        ious, tp, fn, fp = 0.0, 0, 0, 0
        for gt, prediction in images:
            matches, missed, false, excused = compare(category["id"], gt, prediction)
            ious, tp, fn, fp = ious + sum(matches), tp + len(matches), fn + missed, fp + false
            counts += len(matches), missed, false, excused
        if tp + fp + fn:
            sq, rq = ious / max(tp, 1), tp / (tp + fp / 2 + fn / 2)
            rows[category["id"]] = (sq * rq, sq, rq)
    result = {}
    for name, kinds in ("All", (0, 1)), ("Things", (1,)), ("Stuff", (0,)):
        mine = [rows[c["id"]] for c in CATEGORIES if c["id"] in rows and c["isthing"] in kinds]
        pq, sq, rq = np.mean(mine, axis=0) if mine else [math.nan] * 3
        result[name] = {"pq": pq, "sq": sq, "rq": rq, "n": len(mine)}
    return result, counts


def random_map(rng, ids):
    """(ids, segments) of rectangles painted over ``ids``, some of them crowds of things."""
    ids, segments = ids.copy(), {}
    for _ in range(rng.integers(1, 7)):
        y, x = rng.integers(0, ids.shape[0]), rng.integers(0, ids.shape[1])
        segment = int(rng.integers(1, 2**24))
        ids[y : y + rng.integers(1, 12), x : x + rng.integers(1, 16)] = segment
        category = CATEGORIES[rng.integers(len(CATEGORIES))]
        segments[segment] = (category["id"], int(category["isthing"] and rng.random() < 0.4))
    return ids, segments


def perturbed(rng, ids, segments):
    """A prediction: the ground truth moved and renamed, with other segments over it."""
    moved = np.roll(ids, rng.integers(-1, 2, 2), (0, 1))
    renamed = {old: int(rng.integers(1, 2**24)) for old in segments}
    out, extra = random_map(rng, np.vectorize(lambda i: renamed.get(i, 0))(moved))
    segments = {renamed[old]: (category, 0) for old, (category, _) in segments.items()} | {
        new: (category, 0) for new, (category, _) in extra.items()
    }
    return out, segments


def present(ids, segments):
    """The same without the segments that others cover."""
    return ids, {s: v for s, v in segments.items() if (ids == s).any()}


@pytest.mark.parametrize("seed", range(5))
def test_random_maps_score_as_by_the_reference(tmp_path, seed):
    rng = np.random.default_rng(seed)
    totals = np.zeros(4, int)
    for i in range(20):
        images = []
        for _ in range(3):
            gt = random_map(rng, np.zeros((20, 30), np.uint32))
            images.append([present(*gt), present(*perturbed(rng, *gt))])
        expected, counts = reference(images)
        totals += counts
        (tmp_path / f"{i}").mkdir()
        result = quality(tmp_path / f"{i}", *zip(*images, strict=True))
        for name, scores in expected.items():
            assert result[name] == pytest.approx(scores, rel=1e-12, nan_ok=True)
    assert (totals > 10).all(), totals  # each case occurs: matched, missed, false, excused


def test_perfect_prediction(tmp_path):
    image = (halves(7, 300), {7: (1, 0), 300: (92, 0)})
    result = quality(tmp_path, [image], [image])
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 2}
    assert result["Things"]["n"] == result["Stuff"]["n"] == 1


def test_hand_computed(tmp_path):
    gt = halves(1, 2)  # 100 pixels of cat, 100 of sea
    pred = gt.copy()
    pred[:2, :10] = 2  # cat 80; sea 120: IoU 80/100 and 100/120
    segments = {1: (1, 0), 2: (92, 0)}
    result = quality(tmp_path, [(gt, segments)], [(pred, segments)])
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
    result = quality(tmp_path, [(gt, {1: (1, 0), 2: (92, 0)})], [(pred, {1: (1, 0)})])
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
    things = quality(tmp_path, [gt], [same])["Things"]
    assert things["n"] == 0 and all(math.isnan(things[k]) for k in ("pq", "sq", "rq"))
    (tmp_path / "b").mkdir()
    assert quality(tmp_path / "b", [gt], [other])["Things"] == {"pq": 0, "sq": 0, "rq": 0, "n": 1}


@pytest.mark.parametrize("order, pq", [((1, 3), 0.0), ((3, 1), math.nan)])
def test_the_last_of_several_crowds_of_a_category_excuses(tmp_path, order, pq):
    ids = halves(1, 2)
    ids[7:, :10] = 3  # 30 of 100 pixels
    gt = (ids, {s: (1, 1) for s in order} | {2: (92, 0)})
    result = quality(tmp_path, [gt], [(halves(1, 2), {1: (1, 0), 2: (92, 0)})])
    assert result["Things"]["pq"] == pytest.approx(pq, nan_ok=True)


def test_many_images_in_parallel_equal_the_sum(tmp_path):
    good = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    bad = (halves(2, 1), {1: (1, 0), 2: (92, 0)})
    result = quality(tmp_path, [good] * 6, [good, bad, good, good, bad, bad])
    # cat: 3 matches, 3 false positives, 3 false negatives
    assert result["Things"]["rq"] == pytest.approx(3 / (3 + 1.5 + 1.5))


def test_image_without_prediction(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match=r"pred.json .*no prediction .* id 1$"):
        quality(tmp_path, [image, image], [image])


@pytest.mark.parametrize(
    "segments, message",
    [
        ({1: (1, 0)}, "image 0: .* 2 is in the PNG but not in segments_info"),
        ({1: (1, 0), 2: (92, 0), 3: (1, 0)}, "image 0: .* 3 is in segments_info but not in the"),
        ({1: (1, 0), 2: (55, 0)}, "image 0: .* 2 has unknown category_id 55"),
    ],
)
def test_json_and_png_that_disagree(tmp_path, segments, message):
    gt = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match=f"pred.json cannot be scored .*{message}"):
        quality(tmp_path, [gt], [(halves(1, 2), segments)])


def test_prediction_of_another_size(tmp_path):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    small = (halves(1, 2, width=10), {1: (1, 0), 2: (92, 0)})
    with pytest.raises(ValueError, match="image 0: .* 10×20 but the prediction is 10×10"):
        quality(tmp_path, [image], [small])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(b"no image"), "cannot decode panoptic PNG .*pred/0.png"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "pred/0.png: unexpected end"),
        (lambda path: path.unlink(), "cannot open panoptic PNG .*pred/0.png"),
        (lambda path: Image.new("L", (20, 10)).save(path), "pred/0.png is Grayscale"),
        (lambda path: path.parents[1].joinpath("pred.json").write_text("{"), "pred.json: EOF"),
        (lambda path: path.parents[1].joinpath("pred.json").unlink(), "read .*pred.json: No such"),
        (lambda path: path.parents[1].joinpath("gt.json").write_text("{"), "gt.json: not a read"),
        (lambda path: path.parents[1].joinpath("gt/0.png").unlink(), "open .*gt/0.png: No such"),
    ],
)
def test_unreadable_files(tmp_path, spoil, message):
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    gt, pred = write(tmp_path, "gt", [image]), write(tmp_path, "pred", [image])
    spoil(pred[1] / "0.png")
    with pytest.raises(ValueError, match=message):
        panoptic_quality(*gt, *pred)


def quality_of_changed(tmp_path, name, change):
    """The quality of a perfect prediction after a change to the JSON ``name``."""
    image = (halves(1, 2), {1: (1, 0), 2: (92, 0)})
    gt, pred = write(tmp_path, "gt", [image]), write(tmp_path, "pred", [image])
    path = tmp_path / f"{name}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return panoptic_quality(*gt, *pred)


def without(*keys):
    def change(data):
        for segment in data["annotations"][0]["segments_info"]:
            for key in keys:
                del segment[key]

    return change


@pytest.mark.parametrize(
    "name, change",
    [
        ("pred", lambda data: [data.pop(key) for key in ("images", "categories")]),
        ("pred", without("area", "iscrowd")),
        ("gt", without("area", "iscrowd")),  # counted in the PNG, and no crowd
        (
            "gt",
            lambda d: [s.update(area=s["area"] // 2) for s in d["annotations"][0]["segments_info"]],
        ),
        # As CVAT writes them.
        ("gt", lambda data: data["images"][0].update(date_captured=0)),
        ("gt", lambda data: data.update(info={"year": "", "version": ""})),
    ],
)
def test_files_that_lack_or_add_what_does_not_matter(tmp_path, name, change):
    assert quality_of_changed(tmp_path, name, change)["All"]["pq"] == 1


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("pred", without("category_id"), "pred.json: missing field `category_id`"),
        ("gt", without("category_id"), "gt.json: .*missing field `category_id`"),
        ("gt", lambda d: d["categories"][0].pop("isthing"), "gt.json: 1 of 4 .* no `isthing`"),
    ],
)
def test_json_that_is_not_of_cocos_panoptic_form(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        quality_of_changed(tmp_path, name, change)
