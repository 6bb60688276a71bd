import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed")

TOOL = Path(__file__).parents[2] / "tools" / "train_classifier.py"
SMALL = (
    "--dataset caltech101 --arch resnet18 --image-size 32 --epochs 2 --seeds 1 --batch-size 8 "
    "--workers 0 --lr 0.01 --device cpu"
).split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*args):
    return [sys.executable, TOOL, *map(str, args)]


def run(*args):
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=240, env=ENVIRONMENT
    )


def write_images(folder, names, seed):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in names:
        pixels = rng.integers(0, 256, (40, 50, 3) if seed else (40, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")


@pytest.fixture(scope="module")
def caltech(tmp_path_factory):
    """Two categories of ten images, one of them grey as some are, and the background one."""
    root = tmp_path_factory.mktemp("data")
    for seed, category in enumerate(("accordion", "anchor", "BACKGROUND_Google")):
        names = [f"image_{i:04d}" for i in range(1, 11)]
        write_images(root / "caltech101" / "101_ObjectCategories" / category, names, seed)
    return root


def records(output):
    return json.loads((output / "results.json").read_text())["records"]


@pytest.mark.slow
def test_rows_reports_and_resumption(caltech, tmp_path, error_of):
    options = [*SMALL, "--data", caltech, "--output", tmp_path]
    done = run(*options, "--groups", "practical", 32, 1)
    assert done.returncode == 0, done.stderr
    # No layer of ResNet-18 narrows: practical is 1 throughout, and trained once.
    assert [r["row"] for r in records(tmp_path)] == ["32", "1"]
    assert "1 *practical" in done.stdout
    for row, expected in (("practical", 1), ("32", 32)):
        report = json.loads((tmp_path / f"groups_{row}.json").read_text())
        assert len(report) == 20 and {r["num_groups"] for r in report} == {expected}
        widths = {r["name"]: (r["in_channels"], r["out_channels"]) for r in report}
        assert widths["layer2.0.downsample.1"] == (64, 128)
    assert "20 GroupNorm layers: G=1 in 20" in done.stdout
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["train_images"], settings["test_images"], settings["classes"]) == (16, 4, 2)
    assert not list(tmp_path.glob("checkpoint*")) and not list(tmp_path.glob("*.part"))

    before = records(tmp_path)
    again = run(*options, "--groups", 1, 32)
    assert again.returncode == 0 and records(tmp_path) == before
    other = error_of(TOOL, *options, "--groups", 1, "--image-size", 48)
    assert "image_size = 32, this run has image_size = 48" in other
    assert records(tmp_path) == before


@pytest.mark.slow
def test_killed_within_a_run_and_resumed(caltech, tmp_path, kill_after):
    options = [*SMALL, "--data", caltech, "--groups", 16, "--epochs", 4]
    whole = run(*options, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "parts"
    kill_after(command(*options, "--output", output), ENVIRONMENT, output / "checkpoint_16_0.pth")
    assert records(output) == []
    done = run(*options, "--output", output)
    assert done.returncode == 0, done.stderr
    (expected,), (actual,) = records(tmp_path / "whole"), records(output)
    assert actual["train_losses"] == expected["train_losses"]
    assert actual["test_errors"] == expected["test_errors"]


@pytest.mark.slow
def test_every_measured_run_chooses_its_own_counts(caltech, tmp_path):
    options = [*SMALL, "--data", caltech, "--output", tmp_path, "--epochs", 1, "--seeds", 2]
    done = run(*options, "--image-size", 64, "--groups", "measured")
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        report = json.loads((tmp_path / f"groups_measured_{seed}.json").read_text())
        assert len(report) == 20
        assert all(r["out_channels"] % r["num_groups"] == 0 for r in report)
    assert [r["row"] for r in records(tmp_path)] == ["measured", "measured"]


@pytest.mark.slow
def test_pets_in_torchvision_layout(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    names = [f"Beagle_{i}" for i in range(8)] + [f"Sphynx_{i}" for i in range(8)]
    write_images(folder / "images", names, 1)
    (folder / "annotations").mkdir()
    lines = [f"{n} {1 + n.startswith('S')} 1 1\n" for n in names]
    (folder / "annotations" / "trainval.txt").write_text("".join(lines[::2]))
    (folder / "annotations" / "test.txt").write_text("".join(lines[1::2]))
    options = [*SMALL, "--dataset", "pets", "--epochs", 1, "--groups", 2]
    done = run(*options, "--data", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (settings["train_images"], settings["test_images"], settings["classes"]) == (8, 8, 2)


@pytest.mark.slow
def test_an_image_folder_with_batch_norm_and_the_weights_that_are_left(tmp_path):
    for split in ("train", "val"):
        for seed, name in enumerate(("cat", "dog"), 1):
            write_images(tmp_path / "pets" / split / name, range(8), seed)
    options = [*SMALL, "--dataset", tmp_path / "pets", "--arch", "bottleneck20"]
    done = run(*options, "--groups", "BN", 16, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {r["row"] for r in records(tmp_path / "out")} == {"BN", "16"}
    file = torch.load(tmp_path / "out" / "weights_BN_0.pth", weights_only=True)
    assert "1.running_mean" in file["model"]
    assert file["gnp_groups"]["1"]["norm"] == "BatchNorm2d"
    file = torch.load(tmp_path / "out" / "weights_16_0.pth", weights_only=True)
    assert file["gnp_groups"]["1"]["num_groups"] == 16


@pytest.mark.slow
def test_search(caltech, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    options = [*SMALL, "--data", caltech, "--groups", 1, 2, "--epochs", 2, "--search"]
    done = run(*options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "The search cost 1.50 trainings instead of 2." in done.stdout
    assert (tmp_path / "out" / "search.png").stat().st_size > 0
    again = run(*options, "--output", tmp_path / "out")
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--groups", "48"], "48 groups do not divide 64 channels"),
        (["--groups", "pratical"], "--groups takes practical, closest"),
        (["--data", "/dev/null/x"], "caltech101/101_ObjectCategories"),
        (["--output", "/dev/null/out"], "/dev/null/out"),
        (["--groups", "64"], "leave one value per group"),  # 64 channels on 1 x 1 maps
    ],
)
def test_bad_input_in_one_line(caltech, tmp_path, error_of, args, expected):
    small = [*SMALL, "--image-size", 1] if args == ["--groups", "64"] else SMALL
    small = [*small, "--data", caltech, "--output", tmp_path]
    assert expected in error_of(TOOL, *small, *args)


def test_damaged_checkpoint_in_one_line(caltech, tmp_path, error_of):
    damaged = tmp_path / "checkpoint_16_0.pth"
    damaged.write_bytes(b"nothing")
    options = [*SMALL, "--data", caltech, "--groups", 16, "--output", tmp_path]
    assert f"{damaged} must be a checkpoint of this run" in error_of(TOOL, *options)
