"""What needs a GPU, rehearsed on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

ROOT = Path(__file__).parents[1]


def gpu(*args):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # models are tiny
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_all_that_needs_a_gpu_part_by_part(tmp_path):
    parts = ("--dry-run", "--output", tmp_path, "--parts", "torchvision", "group_norm")
    done = gpu(*parts, "--triton", "gone.py")
    assert done.returncode == 1 and "error: failed: group_norm (FileNotFoundError" in done.stderr
    steps = json.loads(read(tmp_path, "torchvision"))["rows"]
    cases = {(row["norm"], row["dtype"], row["layout"]) for row in steps}
    assert len(cases) == len(steps) == 6 and all(0 < row["norms"] < 0.9 for row in steps)
    before = (tmp_path / "torchvision.json").stat().st_mtime_ns

    done = gpu(*parts, "tests")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torchvision: is there already" in done.stdout
    assert (tmp_path / "torchvision.json").stat().st_mtime_ns == before
    counts = {row["tests"]: row["count"] for row in json.loads(read(tmp_path, "tests"))["rows"]}
    assert counts == {"passed": 31, "skipped": 1}  # graphs are CUDA's
    path = tmp_path / "torchvision.json"  # as if it had been measured
    path.write_text(path.read_text().replace('"dry_run": true', '"dry_run": false'))
    assert f"{tmp_path} has a measurement: take another --output" in gpu(*parts).stderr
    norms = json.loads(read(tmp_path, "group_norm"))["rows"]
    assert {row["norm"] for row in norms} == {"copy", "bn", "torch", "split"}
    assert all(row["error"] < 1e-5 for row in norms if row["error"] is not None)
    assert all(
        row["over_32"] == 1 for row in norms if (row["norm"], row["groups"]) == ("torch", 32)
    )
    report = (tmp_path / "report.md").read_text()
    for heading in ("## tests\n", "## group_norm\n", "## torchvision\n"):
        assert f"{heading}\ndevice CPU, torch {torch.__version__.split('+')[0]}" in report


def read(folder, part):
    return (folder / f"{part}.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu("--output", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1].startswith("error: PyTorch finds no GPU; --dry-run")
