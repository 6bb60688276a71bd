import json
import shutil

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog

from gnpractical.d2.own_data import folder_overrides, metadata_of, register_own, use_own_data
from gnpractical.d2.preflight import check_datasets


@pytest.fixture
def folder(few_shapes, tmp_path):
    """A data set of one's own, in COCO's layout."""
    shutil.copytree(few_shapes / "gnp_shapes", tmp_path / "own")
    before = set(DatasetCatalog.list())
    yield tmp_path / "own"
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def spoil(folder, name, change):
    path = folder / "annotations" / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def instances(folder):
    splits = {"DATASETS.TRAIN": "train", "DATASETS.TEST": "val"}
    return [
        word
        for key, split in splits.items()
        for word in (key, f"('coco:{folder}/annotations/instances_{split}.json:{folder}/{split}',)")
    ]


def test_instances_by_name(tiny_cfg, folder, capsys):
    cfg = tiny_cfg(*instances(folder), "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    use_own_data(cfg, "TRAIN", "TEST")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 4
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 5 and cfg.INPUT.MASK_FORMAT == "bitmask"
    assert "MODEL.ROI_HEADS.NUM_CLASSES 4" in capsys.readouterr().out
    (name,) = cfg.DATASETS.TRAIN
    assert MetadataCatalog.get(name).thing_classes == ["disc", "box", "triangle", "star"]
    records = DatasetCatalog.get(name)
    assert len(records) == 8 and "sem_seg_file_name" not in records[0]
    register_own(cfg, "TRAIN", "TEST")  # a second time it does nothing


def test_a_panoptic_folder_is_what_the_shapes_are(tiny_cfg, folder, few_shapes):
    cfg = tiny_cfg(*folder_overrides(str(folder), panoptic=True))
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
    use_own_data(cfg, "TRAIN", "TEST")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 5
    check_datasets(cfg, "TRAIN", "TEST")
    own, shapes = MetadataCatalog.get(cfg.DATASETS.TEST[0]), MetadataCatalog.get("gnp_shapes_val")
    for key in ("thing_classes", "stuff_classes", "stuff_dataset_id_to_contiguous_id"):
        assert own.get(key) == shapes.get(key)

    assert own.stuff_classes == ["things", "sky", "grass", "water", "sand"]
    assert own.stuff_dataset_id_to_contiguous_id == {0: 0, 5: 1, 6: 2, 7: 3, 8: 4}

    def below(records, root):
        return json.loads(json.dumps(records, default=str).replace(str(root), ""))

    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert len(records) == 4 and records[0]["sem_seg_file_name"].endswith("stuff_val/000001.png")
    wanted = below(DatasetCatalog.get("gnp_shapes_val"), few_shapes / "gnp_shapes")
    assert below(records, folder) == wanted


def test_a_stuff_category_may_have_the_id_0():
    panoptic = [{"id": 0, "name": "sky", "isthing": 0}, {"id": 7, "name": "cat", "isthing": 1}]
    metadata = metadata_of(panoptic[1:], panoptic)
    assert metadata["stuff_classes"] == ["things", "sky"]
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {-1: 0, 0: 1}


def test_polygons_stay_polygons(tiny_cfg, folder):
    for split in ("train", "val"):
        polygon = [[1, 1, 9, 1, 9, 9]]
        spoil(
            folder,
            f"instances_{split}.json",
            lambda d, p=polygon: [a.update(segmentation=p) for a in d["annotations"]],
        )
    cfg = tiny_cfg(*instances(folder), "INPUT.MASK_FORMAT", "polygon")
    use_own_data(cfg, "TRAIN", "TEST")
    assert cfg.INPUT.MASK_FORMAT == "polygon"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda d: d["categories"].pop(), "must have the same classes"),
        (lambda d: d.pop("categories"), "val.json is not of COCO's form: KeyError: 'categories'"),
        (lambda d: d["categories"][0].pop("name"), "is not of COCO's form: KeyError: 'name'"),
        (lambda d: d.update(categories=[7]), "is not of COCO's form: TypeError"),
        (lambda d: d.update(annotations=[7]), "is not of COCO's form: AttributeError"),
    ],
)
def test_odd_files_are_named(tiny_cfg, folder, change, expected):
    spoil(folder, "instances_val.json", change)
    with pytest.raises(ValueError, match=expected):
        use_own_data(tiny_cfg(*instances(folder)), "TRAIN", "TEST")


def test_names_and_folders_that_lead_nowhere(tiny_cfg, folder):
    for name, expected in {
        "coco:only.json": "its name must be coco:<json>:<image folder>",
        "coco_panoptic:x": "its name must be coco_panoptic:<folder>:<split>",
        f"coco:{folder}/gone.json:{folder}/train": "json_file .*gone.json' does not exist",
        f"coco_panoptic:{folder}:test": "image_root .*own/test' does not exist.$",
    }.items():
        with pytest.raises(ValueError, match=expected):
            use_own_data(tiny_cfg("DATASETS.TEST", f"('{name}',)"), "TEST")


def test_what_belongs_together(tiny_cfg, folder):
    cfg = tiny_cfg(*instances(folder))
    use_own_data(cfg, "TRAIN", "TEST")
    with pytest.raises(ValueError, match="no semantic labels, which PanopticFPN is trained on"):
        check_datasets(cfg, "TRAIN", "TEST")
    cfg = tiny_cfg(*folder_overrides(str(folder), panoptic=True))
    spoil(folder, "panoptic_train.json", lambda d: d["annotations"].pop())
    use_own_data(cfg, "TRAIN", "TEST")
    with pytest.raises(ValueError, match="must be of the same images; 1 have no panoptic"):
        DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    spoil(folder, "instances_train.json", lambda d: d.update(annotations=[]))
    with pytest.raises(ValueError, match="no annotations, where the panoptic JSON has things"):
        check_datasets(cfg, "TRAIN", "TEST")


def test_masks_are_asked_for(tiny_cfg, folder):
    spoil(folder, "instances_train.json", lambda d: d["annotations"][3].pop("segmentation"))
    cfg = tiny_cfg(*instances(folder), config="faster_rcnn_gnp_ws_shapes.yaml")
    cfg.MODEL.MASK_ON = True
    use_own_data(cfg, "TRAIN", "TEST")
    with pytest.raises(ValueError, match="1 of .* have no 'segmentation', first .*MASK_ON False"):
        check_datasets(cfg, "TRAIN")
    cfg.MODEL.MASK_ON = False
    check_datasets(cfg, "TRAIN")
