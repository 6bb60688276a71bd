import json
import os
import shutil

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gnpractical.d2.datasets import register_shapes
from gnpractical.d2.mapper import CheckedMapper
from gnpractical.d2.preflight import check_datasets
from gnpractical.datasets.coco_files import check_annotations
from gnpractical.datasets.panoptic import read_json

NAME = "gnp_shapes_train"


@pytest.fixture
def own_copy(tmp_path, few_shapes):
    """gnp_shapes registered over a copy that a test may spoil, under a name of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(few_shapes, folder)
    for split in ("train", "val"):
        DatasetCatalog.remove(f"gnp_shapes_{split}")
        MetadataCatalog.remove(f"gnp_shapes_{split}")
    register_shapes(str(folder))
    return folder / "gnp_shapes"


def message(cfg, name=NAME):
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(ValueError) as e:
        check_datasets(cfg, "TRAIN")
    return str(e.value)


def spoil(folder, kind, change):
    path = folder / "annotations" / f"{kind}_train.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_sound_data_pass(tiny_cfg, own_copy):
    check_datasets(tiny_cfg(), "TRAIN", "TEST")


def test_shapes_are_made_where_they_are_missing(tiny_cfg, own_copy, monkeypatch):
    made = []
    monkeypatch.setattr("gnpractical.d2.preflight.make_shapes", made.append)
    check_datasets(tiny_cfg(), "TRAIN")
    assert made == [own_copy.parent]


def test_more_classes_than_the_head_has(tiny_cfg, own_copy):
    text = message(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", "1"))
    assert "has 4 classes: set MODEL.ROI_HEADS.NUM_CLASSES 4, not 1" in text


def test_unregistered_name_names_the_nearest(tiny_cfg):
    text = message(tiny_cfg(), "coco_2017_trian")
    assert "'coco_2017_trian' is not registered" in text and "'coco_2017_train'" in text


def test_missing_coco_names_path_variable_and_default(tiny_cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    text = message(tiny_cfg(), "coco_2017_train")
    assert "coco/train2017" in text and "DETECTRON2_DATASETS" in text and "'datasets'" in text


def test_missing_semantic_pngs_name_the_command(tiny_cfg, own_copy):
    some = sorted((own_copy / "panoptic_stuff_train").iterdir())
    some[0].unlink()
    text = message(tiny_cfg())
    assert "1 of 8 semantic PNGs" in text and some[0].name in text
    assert "tools/prepare_panoptic.py --root" in text
    shutil.rmtree(own_copy / "panoptic_stuff_train")
    assert "tools/prepare_panoptic.py --root" in message(tiny_cfg())


@pytest.mark.parametrize(
    "kind, change, expected",
    [
        ("instances", lambda d: d["annotations"][0].update(category_id=99), "unknown category: 1"),
        (
            "instances",
            lambda d: [a.update(bbox=[900, 0, 5, 5]) for a in d["annotations"]],
            "box outside",
        ),
        (
            "instances",
            lambda d: [a.update(segmentation=[[1, 2]]) for a in d["annotations"]],
            "mask that cannot be drawn",
        ),
        ("instances", lambda d: d.pop("categories"), "the JSON has no 'categories'"),
        ("instances", lambda d: d["images"][0].update(file_name="gone.jpg"), "gone.jpg"),
        ("panoptic", lambda d: d["annotations"][0].update(image_id=12345), "image id without"),
        (
            "panoptic",
            lambda d: d["annotations"][0]["segments_info"][0].update(category_id=99),
            "segment of an unknown category: 1",
        ),
    ],
)
def test_annotations_that_would_train_wrongly(tiny_cfg, own_copy, kind, change, expected):
    spoil(own_copy, kind, change)
    text = message(tiny_cfg())
    assert expected in text and f"{kind}_train.json" in text
    check_datasets(tiny_cfg("MODEL.GNP.CHECK_ANNOTATIONS", "False"), "TRAIN")


def test_what_the_evaluator_needs(tiny_cfg, own_copy):
    spoil(own_copy, "instances", lambda d: d["annotations"][0].pop("area"))
    check_datasets(tiny_cfg("DATASETS.TEST", f"('{NAME}',)"), "TRAIN")
    with pytest.raises(ValueError, match="instances_train.json: 1 of .* have no 'area'"):
        check_datasets(tiny_cfg("DATASETS.TEST", f"('{NAME}',)"), "TEST")


def test_semantic_pngs_of_other_annotations(tiny_cfg, own_copy):
    path = max((own_copy / "panoptic_stuff_train").iterdir())
    Image.new("L", (160, 120)).save(path)
    text = message(tiny_cfg())
    advice = f"delete {path.parent}; run: python tools/prepare_panoptic.py"
    assert f"{path} is not what its panoptic PNG makes; {advice}" in text
    path.write_bytes(b"no image")
    assert f"{path} is not what its panoptic PNG makes; {advice}" in message(tiny_cfg())


def test_nothing_to_score_is_told(own_copy, caplog):
    path = own_copy / "annotations" / "instances_val.json"
    data = json.loads(path.read_text())
    for annotations in ([], None):
        data["annotations"] = annotations
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
        files = {"image_root": str(own_copy / "val"), "json_file": str(path)}
        check_annotations("val", files, "", training=False)
        assert f"{path} has no annotations: there is nothing to score" in caplog.text
        caplog.clear()


def test_harmless_problems_are_logged(tiny_cfg, own_copy, caplog):
    def orphan(data):
        data["annotations"].append(data["annotations"][0] | {"id": 10**6, "image_id": 10**6})

    spoil(own_copy, "instances", orphan)
    check_datasets(tiny_cfg(), "TRAIN")
    assert "image id without image (ignored): 1" in caplog.text


@pytest.mark.parametrize(
    "key, picture, message",
    [
        ("file_name", Image.new("I;16", (160, 120)), "16 or 32 bits a pixel, 8 are required"),
        ("sem_seg_file_name", Image.new("I;16", (160, 120)), "16 or 32 bits a pixel"),
        ("sem_seg_file_name", Image.new("L", (160, 119)), "is 160x119 pixels, but 160x120"),
        ("sem_seg_file_name", Image.new("L", (160, 120), 77), "has label 77, but the model has 5"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_pictures_that_would_be_read_wrongly(
    tiny_cfg, own_copy, tmp_path, key, picture, message, training
):
    sample = DatasetCatalog.get(NAME)[0]
    mapper = CheckedMapper(tiny_cfg(), is_train=training)
    assert "image" in mapper(sample)
    picture.save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=rf"odd.png.*{message}"):
        mapper(sample | {key: str(tmp_path / "odd.png")})


def test_labels_that_are_void_are_scored_but_not_trained_on(tiny_cfg, own_copy, tmp_path):
    Image.new("L", (160, 120), 255).save(tmp_path / "void.png")
    sample = DatasetCatalog.get(NAME)[0] | {"sem_seg_file_name": str(tmp_path / "void.png")}
    CheckedMapper(tiny_cfg(), is_train=False)(sample)
    with pytest.raises(ValueError, match="void.png: every pixel is void"):
        CheckedMapper(tiny_cfg(), is_train=True)(sample)


def test_a_pipe_is_no_picture(tiny_cfg, own_copy, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    sample = DatasetCatalog.get(NAME)[0] | {"file_name": str(tmp_path / "pipe.png")}
    with pytest.raises(ValueError, match="pipe.png is not a file"):
        CheckedMapper(tiny_cfg())(sample)
    with pytest.raises(ValueError, match="pipe.png is not a file"):
        read_json(tmp_path / "pipe.png")


def test_a_picture_that_was_cut_off_is_named(tiny_cfg, own_copy):
    sample = DatasetCatalog.get(NAME)[0]
    path = own_copy / "train" / sample["file_name"].rpartition("/")[2]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=rf"{path}: not a readable image .*truncated"):
        CheckedMapper(tiny_cfg(), is_train=True)(sample)
