"""Mutations of sound annotations: found sound, found problematic, or a ValueError; nothing else."""

import copy

import numpy as np
import pycocotools.mask as coco_mask
import pytest

pytest.importorskip("hypothesis", reason="Hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from gnpractical.datasets.annotations import check_instances, check_panoptic
from gnpractical.datasets.panoptic import semantic_labels

INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(1, 4)],
    "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    "annotations": [
        {
            "id": i,
            "image_id": 1 + i % 3,
            "category_id": (3, 8)[i % 2],
            "bbox": [0.0, 0.0, 40.0, 30.0],
            "iscrowd": 0,
            "segmentation": mask,
        }
        for i, mask in enumerate(
            (
                [[1.0, 2.0, 11.0, 2.0, 11.0, 14.0]],
                {"size": [30, 40], "counts": [600, 100, 500]},
                coco_mask.encode(np.asfortranarray(np.tri(30, 40, dtype=np.uint8))),
                [],
            )
        )
    ],
}
PANOPTIC = {
    "images": [{"id": i, "height": 30, "width": 40} for i in (1, 2)],
    "categories": [
        {"id": 3, "name": "cat", "isthing": 1},
        {"id": 90, "name": "sky", "isthing": 0},
    ],
    "annotations": [
        {
            "image_id": i,
            "file_name": f"{i}.png",
            "segments_info": [{"id": 5, "category_id": 3}, {"id": 7, "category_id": 90}],
        }
        for i in (1, 2)
    ],
}
BAD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.floats(), max_size=8),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


@st.composite
def mutated(draw, sound):
    """``sound`` with up to three of its values, at any depth, replaced, removed or doubled."""
    data = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        node = data
        while isinstance(node, dict | list) and node and (parent is None or draw(st.booleans())):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            break
        action = draw(st.sampled_from(("replace", "remove", "double")))
        if action == "replace":
            parent[key] = draw(BAD)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(node))
    return data


@settings(max_examples=400, deadline=2000, derandomize=True)
@given(mutated(INSTANCES))
def test_instances(data):
    try:
        problems = check_instances(data, [f"{i}.jpg" for i in range(1, 4)])
    except ValueError as e:
        assert str(e)
    else:
        assert all(str(problem) for problem in problems)


@settings(max_examples=300, deadline=2000, derandomize=True)
@given(mutated(PANOPTIC))
def test_panoptic(data):
    try:
        problems = check_panoptic(data, ["1.png", "2.png"])
        assert all(str(problem) for problem in problems)
        semantic_labels(data["categories"])
    except ValueError as e:
        assert str(e)


def test_what_is_mutated_is_sound():
    assert check_instances(INSTANCES) == []
    assert check_panoptic(PANOPTIC) == []
