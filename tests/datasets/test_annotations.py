import copy

import pycocotools.mask as coco_mask
import pytest
from helpers.instances import SQUARE, sound

from gnpractical.datasets.annotations import check_instances, check_panoptic

# Its runs would be 4000, 116, 784 and, by the formula, 100, but pycocotools stops before the last.
NUL = coco_mask.frPyObjects({"size": [50, 100], "counts": [4000, 116, 784]}, 50, 100)
NUL["counts"] = NUL["counts"].decode() + "\0"


def many(annotation, count):
    """Copies that differ by the tenth of a pixel at most."""
    x, *rest = annotation["bbox"]
    return [
        copy.deepcopy(annotation) | {"id": i, "bbox": [x + i / count / 10, *rest]}
        for i in range(count)
    ]


def test_sound_annotations_have_no_problems():
    assert check_instances(sound(), ["a.jpg"]) == []


@pytest.mark.parametrize(
    "change, kind, offender",
    [
        ({"category_id": 77}, "unknown category", "annotation 9 (category 77)"),
        ({"bbox": [200, 10, 20, 20]}, "box outside", "annotation 9 [200, 10, 20, 20] in 100x50"),
        ({"bbox": [10, 10, 0, 5]}, "box outside", "annotation 9"),
        ({"bbox": [90, 10, 40, 20]}, "box outside", "annotation 9"),  # its centre is outside
        ({"bbox": [float("nan"), 1, 2, 2]}, "box outside", "annotation 9"),
        ({"bbox": [1, 1, 2, float("nan")]}, "box outside", "annotation 9"),
        ({"bbox": [1, 1, float("inf"), 2]}, "box outside", "annotation 9"),
        ({"segmentation": [[1.0, 2.0]]}, "mask that cannot be drawn", "has 2 coordinates"),
        (
            {"segmentation": [[1.0, 2.0, 3.0, 4.0], *SQUARE]},  # which pycocotools takes for boxes
            "mask that cannot be drawn",
            "its first polygon has 4 coordinates",
        ),
        (
            {"segmentation": NUL},
            "mask that cannot be drawn",
            "add up to 5000",
        ),
        (
            {"segmentation": [*SQUARE, [1.0, 2.0]], "bbox": [90, 40, 9, 9]},
            "box that its",
            "[90, 40",
        ),
        ({"bbox": [0.1, 0.1, 0.2, 0.4]}, "box of less than a pixel", "annotation 9 [0.1, 0.1"),
        ({"bbox": [40, 5, 10, 10]}, "box that its mask is not in", "annotation 9 [40, 5, 10, 10]"),
        (
            {"bbox": [40, 5, 10, 10], "segmentation": {"size": [50, 100], "counts": [0, 90, 4910]}},
            "box that its mask is not in",
            "annotation 9 [40, 5, 10, 10]",
        ),
        ({"id": "a0"}, "annotation id that is no number", "annotation a0"),
        ({"segmentation": [[1e8, 2.0] * 4]}, "mask that cannot be drawn", "between -400 and 400"),
        ({"segmentation": [[1.0, float("nan")] * 4]}, "mask that cannot be drawn", "coordinates"),
        (
            {"segmentation": {"size": [50, 100], "counts": [10, 10**9]}},
            "mask that cannot be drawn",
            "add up to 5000",
        ),
        (
            {"segmentation": {"size": [50, 100], "counts": [-10, 5010]}},
            "mask that cannot be drawn",
            "add up to 5000",
        ),
        (
            {"segmentation": {"size": [50, 100], "counts": "oooooo0"}},
            "mask that cannot be drawn",
            "add up to 5000",
        ),
        ({"segmentation": [[1.0, 2.0, 9.0, 2.0, 9.0, 9.0, 5.0]]}, "empty mask", "annotation 9"),
        ({"segmentation": [[-9.0, 2.0, -5.0, 2.0, -5.0, 9.0]]}, "empty mask", "annotation 9"),
        ({"segmentation": {"size": [50, 100], "counts": [5000]}}, "empty mask", "annotation 9"),
        ({"segmentation": [[200.0, 10.0, 230.0, 10.0, 230.0, 30.0]]}, "empty mask", "annotation 9"),
        (
            {"segmentation": {"size": [40, 100], "counts": [1000, 3000]}},
            "mask of another size than its image",
            "[40, 100] in 50x100 (height x width)",
        ),
    ],
)
def test_each_problem_names_its_offender_and_is_refused(change, kind, offender):
    data = sound()
    data["annotations"][0] |= change
    (problem,) = check_instances(data, ["a.jpg"])
    assert problem.kind.startswith(kind) and problem.refuse
    assert offender in str(problem) and "1 of 1" in str(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [81, 31, 20, 20], "segmentation": [[81, 31, 101, 31, 101, 51]]},
        {"segmentation": []},
        {"segmentation": None},
        {"bbox": [5, 5, 60, 40]},  # with what is hidden
    ],
)
def test_boxes_that_overhang_and_data_without_masks_are_fine(change):
    data = sound()
    data["annotations"][0] |= change
    assert check_instances(data) == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: d.pop("categories"), "the JSON has no 'categories'"),
        (lambda d: d.update(images={}), "no 'images' that is a list, but {}"),
        (lambda d: d["annotations"][0].pop("bbox"), r"annotations\[0\] .*no 'bbox': {'id': 9"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2]), r"no four numbers: \[1, 2\]"),
        (lambda d: d["annotations"][0].update(bbox="1 2 3 4"), "has an odd 'bbox': {'id': 9"),
        (lambda d: d["annotations"].append("x"), r"annotations\[1\] of the JSON has no 'id': x"),
        (lambda d: d["images"][0].pop("width"), r"images\[0\] of the JSON has no 'width'"),
        (lambda d: d["images"][0].update(width=160.0), r"images\[0\] .* has an odd 'width'"),
        (lambda d: d["images"].append(d["images"][0] | {"id": "2"}), "numbers, partly text"),
    ],
)
def test_json_that_is_not_of_cocos_form(spoil, message):
    data = sound()
    spoil(data)
    with pytest.raises(ValueError, match=message):
        check_instances(data)


def test_every_annotation_an_orphan_is_refused():
    data = sound()
    data["images"][0]["id"] = "1"
    (problem,) = check_instances(data)
    assert problem.refuse


def test_ids_used_twice():
    data = sound()
    data["annotations"].append(data["annotations"][0] | {"bbox": [9, 9, 20, 20]})
    (problem,) = check_instances(data)
    assert problem.kind == "id used twice in 'annotations'" and problem.refuse


def test_annotations_and_pictures_that_come_twice():
    data = sound()
    data["annotations"].append(data["annotations"][0] | {"id": 10})
    (problem,) = check_instances(data)
    assert problem.kind.startswith("annotation given again") and problem.offenders == [
        "annotation 10"
    ]
    data = sound()
    data["images"].append(data["images"][0] | {"id": 2})
    (problem,) = check_instances(data)
    assert problem.kind == "file_name used twice in 'images'" and problem.refuse


def test_categories_of_text():
    data = sound()
    data["categories"][0]["id"] = data["annotations"][0]["category_id"] = "cat"
    (problem,) = check_instances(data)
    assert problem.kind.startswith("category whose id is no number") and problem.refuse
    assert problem.offenders == ["'cat' 'cat'"]
    data = sound()
    data["categories"][0]["name"] = "\ud800"  # half a character, as JSON can have
    (problem,) = check_instances(data)
    assert problem.offenders == [r"3 '\ud800'"] and problem.refuse


def test_images_that_are_not_on_disk():
    (problem,) = check_instances(sound(), ["b.jpg"])
    assert "a.jpg" in str(problem) and problem.refuse
    assert check_instances(sound(), None) == []


def test_orphans_are_reported_but_harmless():
    data = sound()
    data["annotations"].append(data["annotations"][0] | {"id": 10, "image_id": 5})
    (problem,) = check_instances(data)
    assert "image 5" in str(problem) and not problem.refuse


def test_a_few_bad_boxes_of_a_small_data_set_are_tolerated():
    data = sound()
    data["annotations"] = many(data["annotations"][0], 50)
    data["annotations"][7]["bbox"] = [-30, 0, 20, 5]
    (problem,) = check_instances(data)
    assert len(problem.offenders) == 1 and not problem.refuse


def test_a_few_dropped_boxes_are_tolerated_many_are_not():
    data = sound()
    data["annotations"] = many(data["annotations"][0], 1000)
    for i in range(10):
        data["annotations"][i]["bbox"] = [0, -i, 0, 0]
    (problem,) = check_instances(data)
    assert len(problem.offenders) == 10 and not problem.refuse
    assert str(problem).count("annotation") == 3
    data["annotations"][10]["bbox"] = [0, 0, 0, 0]
    assert check_instances(data)[0].refuse


def test_panoptic():
    segment = {"id": 5, "category_id": 3}
    data = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "cat", "isthing": 1}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [segment]}],
    }
    assert check_panoptic(data, ["a.png"]) == []
    segments = data["annotations"][0]["segments_info"]
    segments.append(segment | {"category_id": 4})
    data["annotations"][0]["image_id"] = 2
    kinds = [str(p) for p in check_panoptic(data, [])]
    assert len(kinds) == 4
    assert all("a.png" in k for k in kinds)
    del segments[0]["category_id"]
    with pytest.raises(ValueError, match=r"segments_info\[0\] of a.png has no 'category_id'"):
        check_panoptic(data)
    del data["categories"][0]["isthing"]
    with pytest.raises(ValueError, match=r"categories\[0\] of the JSON has no 'isthing'"):
        check_panoptic(data)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_repeated_ids_are_refused(key):
    data = sound()
    data[key].append(copy.deepcopy(data[key][0]))
    (problem, *_) = check_instances(data, ["a.jpg"])
    assert problem.kind == f"id used twice in {key!r}" and problem.refuse


def test_categories_of_one_name_are_told():
    data = sound()
    data["categories"].append({"id": 77, "name": data["categories"][0]["name"]})
    (problem,) = check_instances(data, ["a.jpg"])
    assert problem.kind == "name used twice in 'categories'" and not problem.refuse


@pytest.mark.parametrize("key", ["images", "categories"])
def test_repeated_ids_of_a_panoptic_file_are_refused(key):
    data = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "cat", "isthing": 1}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": []}],
    }
    data[key] *= 2
    (problem,) = check_panoptic(data)
    assert problem.kind == f"id used twice in {key!r}" and problem.refuse


def test_segments_that_scoring_takes_for_void():
    data = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "cat", "isthing": 1}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "a.png",
                "segments_info": [{"id": 0, "category_id": 3}],
            }
        ],
    }
    (problem,) = check_panoptic(data)
    assert problem.kind.startswith("segment of id 0") and problem.refuse
