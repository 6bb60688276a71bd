"""COCO's panoptic files, for tests."""

import json

import numpy as np
from PIL import Image

from gnpractical.datasets.panoptic import (
    id_to_rgb,
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


def halves(left, right, height=10, width=20):
    ids = np.full((height, width), right, dtype=np.uint32)
    ids[:, : width // 2] = left
    return ids
