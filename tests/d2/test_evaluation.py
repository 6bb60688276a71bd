import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from gnpractical.d2.evaluation import PanopticEvaluator, PredictionGrid, build_evaluator
from gnpractical.datasets.panoptic import read_ids


def kinds(cfg, name):
    return [type(e).__name__ for e in build_evaluator(cfg, name, "unused")._evaluators]


def test_evaluators_fit_data_set_and_model(tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    assert kinds(cfg, "gnp_shapes_val") == [
        "SemSegEvaluator",
        "COCOEvaluator",
        "PanopticEvaluator",
        "PredictionGrid",
    ]
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    assert kinds(cfg, "gnp_shapes_val") == ["COCOEvaluator", "PredictionGrid"]


def test_unknown_kind_names_data_set_and_what_to_set():
    MetadataCatalog.get("odd_data").evaluator_type = "odd"
    with pytest.raises(ValueError, match="'odd_data' has the evaluator_type 'odd'"):
        build_evaluator(get_cfg(), "odd_data", "unused")
    MetadataCatalog.remove("odd_data")


def ground_truth_as_predictions(name, label_divisor=None):
    """(input, output) pairs as a model that sees the ground truth would give them."""
    metadata = MetadataCatalog.get(name)
    import json

    with open(metadata.panoptic_json) as f:
        annotations = {a["image_id"]: a for a in json.load(f)["annotations"]}
    for record in DatasetCatalog.get(name):
        annotation = annotations[record["image_id"]]
        ids = read_ids(f"{metadata.panoptic_root}/{annotation['file_name']}").astype(np.int64)
        out, segments = np.zeros_like(ids), []
        if label_divisor:
            out -= 1
        for k, s in enumerate(annotation["segments_info"], start=1):
            thing = s["category_id"] in metadata.thing_dataset_id_to_contiguous_id
            mapping = (
                metadata.thing_dataset_id_to_contiguous_id
                if thing
                else metadata.stuff_dataset_id_to_contiguous_id
            )
            category = mapping[s["category_id"]]
            if label_divisor:
                out[ids == s["id"]] = s["category_id"] * label_divisor + k
            else:
                out[ids == s["id"]] = k
                segments.append({"id": k, "category_id": category, "isthing": thing})
        yield record, {"panoptic_seg": (torch.tensor(out), None if label_divisor else segments)}


def test_ground_truth_scores_100(tmp_path, few_shapes):
    evaluator = PanopticEvaluator("gnp_shapes_val", str(tmp_path))
    evaluator.reset()
    for record, output in ground_truth_as_predictions("gnp_shapes_val"):
        evaluator.process([record], [output])
    result = evaluator.evaluate()["panoptic_seg"]
    assert result["PQ"] == result["PQ_th"] == result["PQ_st"] == pytest.approx(100)
    assert set(result) == {a + b for a in ("PQ", "SQ", "RQ") for b in ("", "_th", "_st")}


def test_models_that_give_labels_instead_of_segments(tmp_path, few_shapes):
    """Panoptic-DeepLab: segments_info None, ids are category * label_divisor + instance."""
    # In that form category ids are one contiguous range; gnp_shapes' own ids are one already.
    shapes = MetadataCatalog.get("gnp_shapes_val")
    MetadataCatalog.get("labelled").set(
        label_divisor=1000,
        thing_dataset_id_to_contiguous_id={i: i for i in range(1, 5)},
        stuff_dataset_id_to_contiguous_id={i: i for i in range(5, 9)},
        panoptic_json=shapes.panoptic_json,
        panoptic_root=shapes.panoptic_root,
    )
    evaluator = PanopticEvaluator("labelled", str(tmp_path))
    for record, output in ground_truth_as_predictions("gnp_shapes_val", label_divisor=1000):
        evaluator.process([record], [output])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)
    MetadataCatalog.remove("labelled")


def test_grid_of_panoptic_predictions(tmp_path, few_shapes):
    path = tmp_path / "deep" / "grid.png"
    grid = PredictionGrid("gnp_shapes_val", str(path), num_images=3)
    for record, output in ground_truth_as_predictions("gnp_shapes_val"):
        grid.process([record], [output])
    grid.evaluate()
    picture = np.asarray(Image.open(path))
    assert picture.shape == (124, 3 * (2 * 160 + 4), 3)
    left, right = picture[:120, :160], picture[:120, 160:320]
    assert np.abs(left.astype(int) - right).mean() > 10  # the prediction is drawn


def test_grid_of_boxes_and_of_labels(tmp_path, few_shapes):
    record = DatasetCatalog.get("gnp_shapes_val")[0]
    found = Instances((120, 160))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 60, 50], [0, 0, 159, 119]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.1]), torch.tensor([0, 1])
    for output in [{"instances": found}, {"sem_seg": torch.rand(5, 120, 160)}]:
        grid = PredictionGrid("gnp_shapes_val", str(tmp_path / "grid.png"))
        grid.process([record], [output])
        grid.evaluate()
        picture = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
        changed = np.abs(picture[:120, 160:320] - picture[:120, :160]).sum(axis=2) > 30
        assert changed.any()
        if "instances" in output:
            assert not changed[80:, 100:].any()  # the unsure box is not drawn
