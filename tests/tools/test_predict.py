"""Predictions on one's own pictures, with runs of both trainers."""

import json
import shutil

import numpy as np
import pytest
from helpers.forked_tool import forked
from PIL import Image

from gnpractical.datasets.panoptic import read_ids

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture
def predict(places, tmp_path):
    """A function (weights, *inputs, options) -> exit code and what is printed."""

    def run(weights, *inputs, options=()):
        words = ["--weights", weights, "--input", *inputs, "--output", tmp_path / "out", *options]
        return forked("predict.py", list(map(str, words)), places["data"], tmp_path)

    return run


def test_the_results_are_those_of_the_evaluation(run_folder, predict, places, tmp_path):
    images = places["data"] / "gnp_shapes" / "val"
    code, text = predict(run_folder, images, options=["--json", "--threshold", "0"])
    assert code == 0, text
    assert f"{tmp_path / 'out'}: 2 pictures with" in text
    mine = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    wanted = json.loads((run_folder / "inference/coco_instances_results.json").read_text())
    assert len(mine) == len(wanted) > 0
    for a, b in zip(mine, wanted, strict=True):
        assert a["category_id"] == b["category_id"] and a["segmentation"] == b["segmentation"]
        assert a["file_name"].endswith(f"{b['image_id']:06d}.jpg")
        np.testing.assert_allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], atol=1e-3)
    least = sorted(entry["score"] for entry in wanted)[len(wanted) // 2] + 1e-9
    code, _ = predict(run_folder, images, options=["--json", "--threshold", str(least)])
    some = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert code == 0 and 0 < len(some) < len(mine)
    assert some == [entry for entry in mine if entry["score"] >= least]
    data = json.loads((tmp_path / "out" / "panoptic_predictions.json").read_text())
    assert [c["name"] for c in data["categories"] if c["isthing"]][:2] == ["disc", "box"]
    for annotation in data["annotations"]:
        ids = read_ids(tmp_path / "out" / "panoptic" / annotation["file_name"])
        assert set(np.unique(ids)) - {0} == {s["id"] for s in annotation["segments_info"]}
    for path in images.iterdir():
        assert Image.open(tmp_path / "out" / path.name).size == (160, 120)


def test_pictures_of_all_kinds(run_folder, predict, places, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    image = Image.open(places["data"] / "gnp_shapes" / "val" / "000001.jpg")
    for mode in ("L", "LA", "RGBA", "P", "1"):
        image.convert(mode).save(folder / f"{mode}.png")
    image.convert("CMYK").save(folder / "CMYK.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "16.png")
    turned = image.rotate(90, expand=True)
    exif = turned.getexif()
    exif[274] = 6  # to be turned back by the reader
    turned.save(folder / "exif.jpg", exif=exif)
    image.save(folder / "sub" / "same.jpg")
    image.save(folder / "same.jpg")
    image.save(folder / "same.png")
    (folder / "cut.jpg").write_bytes((folder / "same.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("no picture")
    image.resize((500, 2)).save(folder / "thin.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tiff")
    (folder / "earlier").mkdir()
    (folder / "earlier" / ".lock").write_text("")  # as a run leaves
    image.save(folder / "earlier" / "same.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exif.jpg").symlink_to(folder / "exif.jpg")
    before = (folder / "exif.jpg").read_bytes()
    code, text = predict(run_folder, folder)
    assert code == 0, text
    assert (folder / "exif.jpg").read_bytes() == before
    assert f"{folder}: 1 pictures in folders of runs are left out" in text
    for name in ("cut.jpg", "text.jpg", "thin.png", "float.tiff"):
        assert f"skipped: {folder / name}: " in text
    assert "11 pictures with" in text and "4 files were skipped" in text
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.jpg")}
    names = {"L", "LA", "RGBA", "P", "1", "CMYK", "16", "exif", "same.jpg", "same.png", "sub/same"}
    assert written == {f"{name}.jpg" for name in names}
    assert {Image.open(tmp_path / "out" / name).size for name in written} == {(160, 120)}


def test_bad_input(run_folder, predict, places, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(picture)
    text = tmp_path / "b.png"
    text.write_text("no picture")
    moved = tmp_path / "model.pth"
    shutil.copy(run_folder / "model_final.pth", moved)
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder, damaged)
    for name in ("options.json", "config.yaml"):
        if (damaged / name).exists():
            (damaged / name).write_text("{")
    odd = tmp_path / "odd"
    shutil.copytree(run_folder, odd)
    if (odd / "options.json").exists():
        options = json.loads((odd / "options.json").read_text())
        (odd / "options.json").write_text(json.dumps(options | {"min_size": "large"}))
    else:
        (odd / "config.yaml").write_text("INPUT: {MIN_SIZE_TEST: large}")
    lazy = tmp_path / "lazy"
    shutil.copytree(run_folder, lazy)
    (lazy / "options.json").unlink(missing_ok=True)
    (lazy / "config.yaml").write_text("model:\n  _target_: detectron2.modeling.PanopticFPN\n")
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    for options in (other / "options.json", other / "config.yaml"):
        if options.exists():
            options.write_text(options.read_text().replace("GN_PRACTICAL", "GN_1"))
    code, printed = predict(other, picture)
    assert code == 1 and "model_final.pth was trained with other group counts" in printed
    assert "To load it all the same" not in printed  # by options that this tool does not have
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ((tmp_path / "gone", picture), "gone does not exist"),
        ((empty, picture), "there is no checkpoint in this folder"),
        ((moved, picture), "has neither options.json"),
        ((damaged, picture), str(damaged)),
        ((lazy, picture), "config.yaml is a LazyConfig"),
        ((odd, picture), str(odd)),
        ((run_folder, tmp_path / "*.gif"), "nor a file of this pattern"),
        ((run_folder, empty), "there is no picture in this folder"),
        ((run_folder, text), "none of the 1 files could be read"),
        ((run_folder, picture, "--threshold", "2"), "--threshold must be between 0 and 1, got 2"),
        ((run_folder, tmp_path / "out"), "there is no picture in this folder"),
        ((run_folder, picture, "--device", "gpu9"), "--device must be a device of this machine"),
    ]
    (tmp_path / "out").mkdir(exist_ok=True)
    for (weights, picture, *options), expected in cases:
        code, printed = predict(weights, picture, options=options)
        line = printed.splitlines()[-1]
        assert code == 1 and line.startswith("error: ") and expected in line, printed
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "c.png")
    code, printed = predict(run_folder, tmp_path / "out")
    assert code == 1 and "holds all of --input: take another folder" in printed
