import json
import multiprocessing

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gnpractical.datasets import shapes
from gnpractical.datasets.annotations import check_instances, check_panoptic
from gnpractical.datasets.panoptic import panoptic_quality, read_ids

FEW = {"train": 12, "val": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.make_shapes(tmp_path_factory.mktemp("datasets"), FEW)


def load(folder, kind, split="train"):
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text())


def test_deterministic_from_the_seed():
    image, segments = shapes.draw_image("train", 3)
    again, same = shapes.draw_image("train", 3)
    np.testing.assert_array_equal(image, again)
    assert [s["name"] for s in segments] == [s["name"] for s in same]
    for other in [("train", 4), ("val", 3), ("train", 3, 1)]:
        assert not np.array_equal(image, shapes.draw_image(*other)[0])


def test_segments_partition_the_image_but_for_what_is_mostly_hidden():
    for i in range(20):
        _, segments = shapes.draw_image("val", i)
        cover = sum(s["mask"].astype(int) for s in segments)
        assert cover.max() == 1
        assert (cover == 0).mean() < 0.1


def test_has_every_class_overlaps_and_crowds():
    drawn = [shapes.draw_image("train", i)[1] for i in range(60)]
    names = {s["name"] for segments in drawn for s in segments}
    assert names == set(shapes.THINGS + shapes.STUFF)
    assert any(s["iscrowd"] for segments in drawn for s in segments)
    areas = [s["mask"].sum() for segs in drawn for s in segs if s["name"] in shapes.THINGS]
    assert min(areas) < 12**2 and max(areas) > 40**2


def test_files_load_as_coco_and_are_sound(folder):
    for split, count in FEW.items():
        coco = COCO(folder / "annotations" / f"instances_{split}.json")
        assert len(coco.imgs) == count
        files = [p.name for p in (folder / split).iterdir()]
        assert check_instances(load(folder, "instances", split), files) == []
        pngs = [p.name for p in (folder / f"panoptic_{split}").iterdir()]
        assert check_panoptic(load(folder, "panoptic", split), pngs) == []
        image = Image.open(folder / split / files[0])
        assert image.format == "JPEG" and image.size == (shapes.WIDTH, shapes.HEIGHT)


def test_instance_masks_are_the_panoptic_segments(folder):
    coco = COCO(folder / "annotations" / "instances_train.json")
    panoptic = {a["image_id"]: a for a in load(folder, "panoptic")["annotations"]}
    checked = 0
    for annotation in coco.anns.values():
        entry = panoptic[annotation["image_id"]]
        ids = read_ids(folder / "panoptic_train" / entry["file_name"])
        for segment in entry["segments_info"]:
            if segment["bbox"] == annotation["bbox"] and segment["area"] == annotation["area"]:
                mask = ids == segment["id"]
                iou = (mask & coco.annToMask(annotation)).sum() / (
                    mask | coco.annToMask(annotation).astype(bool)
                ).sum()
                assert iou > 0.9
                checked += 1
    assert checked == len(coco.anns) > 20


def test_semantic_pngs_agree_with_the_panoptic_ones(folder):
    for annotation in load(folder, "panoptic")["annotations"]:
        ids = read_ids(folder / "panoptic_train" / annotation["file_name"])
        semantic = np.asarray(Image.open(folder / "panoptic_stuff_train" / annotation["file_name"]))
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            expected = 0 if category <= len(shapes.THINGS) else category - len(shapes.THINGS)
            assert (semantic[ids == segment["id"]] == expected).all()
        assert (semantic[ids == 0] == 255).all()


def test_ground_truth_scores_itself_perfectly(folder):
    path = folder / "annotations" / "panoptic_train.json"
    data = load(folder, "panoptic")
    result = panoptic_quality(path, folder / "panoptic_train", path, folder / "panoptic_train")
    assert result["All"]["pq"] == pytest.approx(1)
    assert result["All"]["n"] <= len(data["categories"])


def test_polygons_rasterize_to_their_mask():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:10, 4:20] = True
    mask[8:15, 10:12] = True
    mask[17:19, 25:28] = True  # a second part
    polygons = shapes.mask_to_polygons(mask)
    assert len(polygons) == 2
    rles = coco_mask.frPyObjects(polygons, *mask.shape)
    np.testing.assert_array_equal(coco_mask.decode(coco_mask.merge(rles)).astype(bool), mask)


def test_polygons_fill_holes_and_survive_corners_that_touch():
    ring = np.zeros((9, 9), dtype=bool)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    assert len(shapes.mask_to_polygons(ring)) == 1
    diagonal = np.eye(4, dtype=bool)
    rles = coco_mask.frPyObjects(shapes.mask_to_polygons(diagonal), 4, 4)
    np.testing.assert_array_equal(coco_mask.decode(coco_mask.merge(rles)).astype(bool), diagonal)


def test_made_once_and_complete(tmp_path):
    first = shapes.make_shapes(tmp_path, FEW)
    stamp = (first / "annotations" / "instances_train.json").stat().st_mtime_ns
    assert shapes.make_shapes(tmp_path, FEW) == first
    assert (first / "annotations" / "instances_train.json").stat().st_mtime_ns == stamp
    assert {p.name for p in tmp_path.iterdir()} <= {shapes.FOLDER, ".gnp_shapes.lock"}


def test_an_interrupted_run_leaves_nothing_half_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "prepare_semantic", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shapes.make_shapes(tmp_path, FEW)
    assert {p.name for p in tmp_path.iterdir()} <= {".gnp_shapes.lock"}


@pytest.mark.slow
def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=shapes.make_shapes, args=(tmp_path, FEW)) for _ in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert {p.name for p in tmp_path.iterdir()} <= {shapes.FOLDER, ".gnp_shapes.lock"}
    assert len(list((tmp_path / shapes.FOLDER / "train").iterdir())) == FEW["train"]
