import numpy as np
import pycocotools.mask as coco_mask
from helpers.instances import sound

from gnpractical.datasets.annotations import check_instances
from gnpractical.datasets.masks import run_lengths


def test_compressed_run_lengths_are_those_that_pycocotools_writes():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng.random((50, 100)) < share).astype(np.uint8)
        rle = coco_mask.encode(np.asfortranarray(mask))
        data = sound()
        mask_of_all = {"size": [50, 100], "counts": rle["counts"]}
        data["annotations"][0] |= {"segmentation": mask_of_all, "bbox": [0, 0, 100, 50]}
        kinds = [problem.kind for problem in check_instances(data)]
        assert kinds == ([] if share else ["empty mask, or outside its image"])
        assert sum(run_lengths(rle["counts"])) == 5000
        assert sum(run_lengths(rle["counts"])[1::2]) == mask.sum()


def test_a_mask_of_run_lengths_in_its_box():
    mask = np.zeros((50, 100), np.uint8)
    mask[30:40, 80:95] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    data = sound()
    data["annotations"][0] |= {"segmentation": rle, "bbox": [80, 30, 15, 10]}
    assert check_instances(data) == []
