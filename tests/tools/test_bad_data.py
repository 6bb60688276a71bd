"""Wrong annotations and pictures, which both trainers refuse in a line that names the file."""

import json
import math
import shutil

import pytest
from helpers.forked_tool import ONE_STEP
from PIL import Image, ImageOps

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def each(key, **changed):
    """A change of every entry of a JSON's list."""
    return lambda data: [entry.update(changed) for entry in data[key]]


def drop(*path):
    """A change that takes a key from a JSON, or from every entry of one of its lists."""
    if len(path) == 1:
        return lambda data: data.pop(path[0])
    return lambda data: [entry.pop(path[1]) for entry in data[path[0]]]


def rotate(key, name):
    """A change that gives every entry of a list the value that the next one has."""

    def change(data):
        values = [entry[name] for entry in data[key]]
        for entry, value in zip(data[key], values[1:] + values[:1], strict=True):
            entry[name] = value

    return change


def text_categories(data):
    for entry in data["categories"]:
        entry["id"] = f"c{entry['id']}"
    for annotation in data["annotations"]:
        for part in annotation.get("segments_info", [annotation]):
            part["category_id"] = f"c{part['category_id']}"


def segments(**changed):
    return lambda data: [s.update(changed) for a in data["annotations"] for s in a["segments_info"]]


RLE = {"size": [120, 160], "counts": [5]}
CHANGES = {
    "instances": {
        **{f"no {key}": drop(key) for key in ("images", "annotations", "categories")},
        **{f"{key} null": lambda d, k=key: d.update({k: None}) for key in ("images", "categories")},
        "no annotation of a thing": lambda data: data.update(annotations=[]),
        "no bbox": drop("annotations", "bbox"),
        "no id": drop("annotations", "id"),
        "no name": drop("categories", "name"),
        "no file_name": drop("images", "file_name"),
        "no width": drop("images", "width"),
        "images empty": lambda data: data.update(images=[], annotations=[]),
        "names rotated": rotate("images", "file_name"),
        "one name": each("images", file_name="000001.jpg"),
        "categories of text": text_categories,
        "given twice": lambda data: data["annotations"].extend(
            [a | {"id": a["id"] + 1000} for a in data["annotations"]]
        ),
        "one id": each("annotations", id=1),
        "ids of text": lambda data: [a.update(id=f"a{a['id']}") for a in data["annotations"]],
        "one image id": each("images", id=1),
        "image ids partly text": lambda data: data["images"][0].update(id="1"),
        "unknown category": each("annotations", category_id=99),
        "category list": each("annotations", category_id=[1]),
        **{f"iscrowd {c}": each("annotations", iscrowd=c) for c in ("0", None, [], 2, 0.5)},
        **{f"area {a}": each("annotations", area=a) for a in ("12", None, -5, math.nan)},
        "all crowds": each("annotations", iscrowd=1),
        "file gone": each("images", file_name="gone.jpg"),
        "file number": each("images", file_name=7),
        "size 0": each("images", width=0, height=0),
        "size text": each("images", width="wide"),
        "size float": each("images", width=160.0),
        "other size": each("images", width=161),
        **{
            f"bbox {box}": each("annotations", bbox=box)
            for box in (
                *([], [1, 2, 3], ["a"] * 4, None, 5, [math.nan] * 4, [0, 0, math.inf, 9]),
                *([0, 0, 0, 0], [0, 0, -5, 5], [900, 900, 5, 5], [1e30] * 4),
                *([0.1, 0.1, 0.2, 0.2], [0, 0, 3, 3]),
            )
        },
        **{
            f"mask {str(mask)[:30]}": each("annotations", segmentation=mask)
            for mask in (
                *([[1e8] * 6], [[math.nan] * 6], [["a"] * 6], [[1, 2, 3]], [5], 7, "text"),
                *([[1, 2, 3, 4], [1, 1, 9, 1, 9, 9]], [[]], RLE | {"counts": "_T40\0"}),
                *(RLE, RLE | {"counts": "???"}, RLE | {"counts": [-1, 19201]}, RLE | {"size": []}),
                *({"size": [120, 160]}, {"counts": [19200]}, {"size": [9, 9], "counts": [81]}),
            )
        },
    },
    "panoptic": {
        **{f"no {key}": drop(key) for key in ("annotations", "categories")},
        "no isthing": drop("categories", "isthing"),
        "isthing turned round": lambda data: [
            category.update(isthing=1 - category["isthing"]) for category in data["categories"]
        ],
        "ids not in the PNGs": lambda d: [
            s.update(id=s["id"] + 5000) for a in d["annotations"] for s in a["segments_info"]
        ],
        "empty segments": each("annotations", segments_info=[]),
        "image ids rotated": rotate("annotations", "image_id"),
        "categories of text": text_categories,
        "iscrowd null": segments(iscrowd=None),
        "segment id 0": lambda d: [a["segments_info"][0].update(id=0) for a in d["annotations"]],
        "bbox elsewhere": segments(bbox=[0, 0, 3, 3]),
        **{
            f"image ids {kind.__name__}": lambda d, k=kind: [
                d.update(images=[i | {"id": k(i["id"])} for i in d["images"]]),
                [a.update(image_id=k(a["image_id"])) for a in d["annotations"]],
            ]
            for kind in (str, float)
        },
        "isthing 2": each("categories", isthing=2),
        "isthing text": each("categories", isthing="no"),
        "no segments": drop("annotations", "segments_info"),
        "unknown category": segments(category_id=99),
        "category null": segments(category_id=None),
        "unknown image": each("annotations", image_id=99),
        "annotation twice": lambda d: d["annotations"].append(d["annotations"][0]),
        "file gone": each("annotations", file_name="gone.png"),
        "no images": drop("images"),
    },
}
TEXTS = {
    "empty": "",
    "cut": '{"images": [',
    "binary": "\x00\x01\x02",
    "list": "[1, 2]",
    "number": "7",
    "null": "null",
    "nested": "[" * 10**5,
}
PICTURES = {  # what every picture in a folder becomes
    "empty": ("train", b""),
    "text": ("train", b"no image"),
    "16 bits": ("train", Image.new("I;16", (160, 120))),
    "other size": ("train", Image.new("RGB", (99, 120))),
    "labels empty": ("panoptic_stuff_train", b""),
    "labels text": ("panoptic_stuff_train", b"no image"),
    "labels 16 bits": ("panoptic_stuff_train", Image.new("I;16", (160, 120))),
    "labels of other size": ("panoptic_stuff_train", Image.new("L", (160, 99))),
    "labels void": ("panoptic_stuff_train", Image.new("L", (160, 120), 255)),
    "labels of a palette": ("panoptic_stuff_train", Image.new("P", (160, 120))),
    "segments mirrored": ("panoptic_train", ImageOps.mirror),
    "labels out of range": ("panoptic_stuff_train", Image.new("L", (160, 120), 77)),
}
DATA = [(kind, name) for kind in CHANGES for name in (*CHANGES[kind], *TEXTS)]
DATA += [("pictures", name) for name in PICTURES]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["train_torchvision.py", "train_net.py"])
@pytest.mark.parametrize("kind, name", DATA)
def test_data(refused, places, tmp_path, tool, kind, name):
    shutil.copytree(places["data"], tmp_path / "data")
    folder = tmp_path / "data" / "gnp_shapes"
    if kind == "pictures":
        where, content = PICTURES[name]
        for path in (folder / where).iterdir():
            if callable(content):
                content(Image.open(path)).save(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.save(path, format="PNG")
    else:
        path = folder / "annotations" / f"{kind}_train.json"
        if name in TEXTS:
            path.write_text(TEXTS[name])
        else:
            data = json.loads(path.read_text())
            CHANGES[kind][name](data)
            path.write_text(json.dumps(data))
    line = refused(tool, ONE_STEP[tool], tmp_path / "data")
    assert str(folder) in line or "annotation" in line or "isthing" in line, line
