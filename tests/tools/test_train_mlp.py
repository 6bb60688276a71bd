import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

TOOL = Path(__file__).parents[2] / "tools" / "train_mlp.py"
SMALL = ["--epochs", "2", "--seeds", "2", "--batch-size", "32", "--device", "cpu"]


def run(*args):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, timeout=120
    )


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise with a bright row that gives the digit away; as torchvision unpacks MNIST."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 320), ("t10k", 100)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28))
        images[np.arange(count), 2 * labels] = 255
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return root


def records(output):
    return json.loads((output / "results.json").read_text())["records"]


@pytest.mark.slow
def test_table_figure_and_resumption(data, tmp_path, error_of):
    output = tmp_path / "new" / "out"
    done = run(*SMALL, "--data", data, "--output", output, "--groups", "practical", 512, 64, 1)
    assert done.returncode == 0, done.stderr
    first = records(output)
    assert [r["row"] for r in first] == ["1", "64", "512"] * 2
    assert [r["seed"] for r in first] == [0, 0, 0, 1, 1, 1]
    for r in first:
        assert len(r["train_losses"]) == len(r["test_errors"]) == 2
        assert r["test_error"] == r["test_errors"][-1]
    errors = {r["row"]: r["test_error"] for r in first}
    assert errors["512"] == 90.0  # one answer for every image
    assert errors["64"] < 50
    rows = [line.split() for line in done.stdout.splitlines()]
    table = {row[0]: row for row in rows if "+-" in row}
    assert list(table) == ["1", "64", "512"]
    assert table["64"][1:3] == ["*practical", "2"] and table["64"][6] == "1.670"
    assert table["512"][1:6] == ["2", "90.00", "+-", "0.00", "88.650"]
    figure = (output / "train_loss.png").read_bytes()
    assert figure.startswith(b"\x89PNG")

    (output / "train_loss.png").unlink()
    again = run(*SMALL, "--data", data, "--output", output, "--groups", 64, 2)
    assert again.returncode == 0, again.stderr
    assert records(output)[:6] == first  # the seconds too: nothing was trained twice
    assert [r["row"] for r in records(output)[6:]] == ["2", "2"]
    assert "*practical" not in again.stdout and (output / "train_loss.png").exists()

    options = [*SMALL, "--data", data, "--output", output, "--groups", 64, "--lr", 0.2]
    other = error_of(TOOL, *options)
    assert "lr = 0.1, this run has lr = 0.2. Use another --output" in other
    assert records(output)[:6] == first


@pytest.mark.slow
def test_rules_choose_divisors(data, tmp_path):
    rules = ["practical", "exact", "measured"]
    small = [*SMALL, "--seeds", 1, "--epochs", 1, "--data", data, "--output", tmp_path]
    done = run(*small, "--groups", *rules)
    assert done.returncode == 0, done.stderr
    for rule in rules:
        (line,) = (x for x in done.stdout.splitlines() if f"*{rule}" in x)
        assert 512 % int(line.split()[0]) == 0
    assert len({r["row"] for r in records(tmp_path)}) == len(records(tmp_path))


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--groups", "48"], "48 groups do not divide 512 channels"),
        (["--groups", "64", "pratical"], "--groups takes practical, closest"),
        (["--data", "/dev/null/mnist"], "Put the four original .gz files into"),
        (["--output", "/dev/null/out"], "/dev/null/out"),
        (["--epochs", "0"], "--epochs must be above 0, got 0"),
    ],
)
def test_bad_input_in_one_line(data, tmp_path, error_of, args, expected):
    assert expected in error_of(TOOL, "--data", data, "--output", tmp_path, *args)


def test_damaged_results_in_one_line(data, tmp_path, error_of):
    (tmp_path / "results.json").write_text('{"settings"')
    error = error_of(TOOL, "--data", data, "--output", tmp_path, "--groups", "1")
    assert f"{tmp_path / 'results.json'} must be a results file" in error
