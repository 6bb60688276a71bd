import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_torchvision.py")
TINY = ["--quick", "--min-size", "64", "--lr", "0.001", "--checkpoint-period", "1"]


def run(environment, *args, launcher=(sys.executable,)):
    return subprocess.run(
        [*launcher, TOOL, *TINY, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_train_and_evaluate_and_one_evaluates_again(environment, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = run(environment, "--iterations", "2", "--output-dir", str(tmp_path), launcher=torchrun)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    last = done.stdout.splitlines()[-1]
    assert "bbox AP" in last and "panoptic_seg PQ" in last and "predictions.png" in last
    assert done.stdout.count("Panoptic Evaluation Results") == 1
    again = run(environment, "--test-only", "--resume", "--output-dir", str(tmp_path))
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.splitlines()[-1] == last  # the images were each predicted once


@pytest.mark.slow
def test_killed_and_resumed(environment, tmp_path, kill_after):
    opts = [
        "--iterations",
        "12",
        "--model",
        "fasterrcnn_resnet_fpn",
        "--norm",
        "GN_1",
        "--weight-standardization",
        "--output-dir",
        str(tmp_path),
    ]
    command = [sys.executable, TOOL, *TINY, *opts]
    kill_after(command, environment, tmp_path / "model_0000002.pth")
    assert not (tmp_path / "model_final.pth").exists()
    done = run(environment, "--resume", *opts)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "groups.json").read_text())
    assert {row["num_groups"] for row in rows} == {1} and rows[0]["weight_standardized"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-2]["iteration"] == 11 and "bbox/AP" in lines[-1]
    assert "segm/AP" not in lines[-1]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--norm", "GN_PRATICAL"], "Unknown norm 'GN_PRATICAL'"),
        (["--norm", "GN_48"], "48"),
        (["--output-dir", "/dev/null/x"], "--output-dir '/dev/null/x' cannot be written"),
        (["--dataset", "coco"], "--data-path"),
        (["--test-only"], "--test-only needs either --weights FILE, or --resume"),
        (["--test-only", "--resume"], "there is no checkpoint in"),
        (["--weights", "gone.pth"], "Checkpoint 'gone.pth' does not exist"),
        (["--device", "gpu"], "--device must be a device of this machine"),
        (["--lr", "nan"], "--lr must be at least 0, got nan"),
        (["--test-only", "--resume", "--weights", "x"], "--test-only needs either --weights"),
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--min-size", "0"], "--min-size must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
    ],
)
def test_bad_input_in_one_line(error_of, environment, tmp_path, monkeypatch, args, expected):
    monkeypatch.setenv("DETECTRON2_DATASETS", environment["DETECTRON2_DATASETS"])
    assert expected in error_of("train_torchvision.py", *TINY, "--output-dir", tmp_path, *args)
