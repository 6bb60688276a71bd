import json
import math

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torch
from PIL import Image
from torch import nn

from gnpractical.datasets.coco_files import split_files
from gnpractical.datasets.panoptic import read_ids, read_json
from gnpractical.tv.datasets import CocoImages
from gnpractical.tv.evaluation import evaluate


class Oracle(nn.Module):
    """Predicts the ground truth, image after image."""

    def __init__(self, dataset, score=0.9):
        super().__init__()
        self.dataset, self.score, self.index = dataset, score, 0

    def forward(self, images):
        _, target = self.dataset[self.index]
        self.index += 1
        n = len(target["labels"])
        result = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.full((n,), self.score),
        }
        if self.dataset.panoptic:
            result["masks"] = target["masks"][:, None].float()
            result["panoptic_ids"], result["segments"] = self.segments(target["image_id"])
        return [result]

    def segments(self, image_id):
        files = self.dataset.files
        annotations = read_json(files["panoptic_json"])["annotations"]
        annotation = next(a for a in annotations if a["image_id"] == image_id)
        ids = read_ids(f"{files['panoptic_root']}/{annotation['file_name']}")
        out, segments = np.zeros(ids.shape, np.int64), []
        for k, s in enumerate(annotation["segments_info"], 1):
            thing = s["category_id"] <= 4
            out[ids == s["id"]] = k
            label = s["category_id"] - (0 if thing else 4)
            segments.append({"id": k, "label": label, "isthing": thing})
        return torch.from_numpy(out), segments


def dataset_of(datasets_dir, panoptic):
    files = split_files(str(datasets_dir / "gnp_shapes"), "val")
    return CocoImages(files, panoptic=panoptic, train=False)


def test_the_ground_truth_scores_100(datasets_dir, tmp_path):
    dataset = dataset_of(datasets_dir, panoptic=True)
    scores = evaluate(Oracle(dataset), dataset, str(tmp_path / "out"), torch.device("cpu"))
    for key in ("bbox/AP", "bbox/AP50", "segm/AP", "panoptic_seg/PQ", "panoptic_seg/RQ_th"):
        assert scores[key] == pytest.approx(100, abs=0.6), key
    picture = np.asarray(Image.open(tmp_path / "out" / "predictions.png")).astype(int)
    assert picture.shape == (2 * 124, 3 * (2 * 160 + 4), 3)
    assert np.abs(picture[:120, :160] - picture[:120, 160:320]).mean() > 10  # it is drawn
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= {1, 2, 3, 4} and "segmentation" in results[0]


def test_boxes_alone(datasets_dir, tmp_path):
    dataset = dataset_of(datasets_dir, panoptic=False)
    scores = evaluate(Oracle(dataset), dataset, str(tmp_path), torch.device("cpu"))
    assert scores.keys() == {"bbox/AP", "bbox/AP50", "bbox/AP75"}
    assert scores["bbox/AP"] == pytest.approx(100)
    unsure = tmp_path / "unsure"
    evaluate(Oracle(dataset, score=0.1), dataset, str(unsure), torch.device("cpu"))
    sure, plain = (np.asarray(Image.open(p / "predictions.png")) for p in (tmp_path, unsure))
    assert (sure != plain).any()
    assert np.array_equal(plain[:120, :160], plain[:120, 160:320])  # the unsure are not drawn


def test_no_predictions_at_all(datasets_dir, tmp_path, caplog):
    caplog.set_level("INFO")

    class Silent(Oracle):
        def forward(self, images):
            (result,) = super().forward(images)
            return [{k: v[:0] for k, v in result.items()}]

    dataset = dataset_of(datasets_dir, panoptic=False)
    scores = evaluate(Silent(dataset), dataset, str(tmp_path), torch.device("cpu"))
    assert set(scores.values()) == {0.0}
    assert "bbox of 0 predictions" in caplog.text
    dataset.coco.anns.clear()
    dataset.coco.imgToAnns.clear()
    scores = evaluate(Silent(dataset), dataset, str(tmp_path), torch.device("cpu"))
    assert all(math.isnan(value) for value in scores.values())
    scores = evaluate(Oracle(dataset), dataset, str(tmp_path), torch.device("cpu"))
    assert all(math.isnan(value) for value in scores.values())  # not COCO's -1, in %
