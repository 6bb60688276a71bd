import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")


ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_net.py")
CONFIG = ["--config-file", "configs/quick/pfpn_gnp_shapes.yaml"]
TINY = [
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "INPUT.MIN_SIZE_TRAIN",
    "(64,)",
    "INPUT.MIN_SIZE_TEST",
    "64",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.MAX_ITER",
    "3",
    "SOLVER.BASE_LR",
    "0.001",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SOLVER.CHECKPOINT_PERIOD",
    "1",
]


def run(environment, *args, launcher=(sys.executable,), timeout=300):
    return subprocess.run(
        [*launcher, TOOL, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
    )


def iterations(out):
    with open(out / "metrics.json") as f:
        return [json.loads(line)["iteration"] for line in f]


@pytest.mark.slow
def test_a_folder_of_ones_own_in_two_processes(environment, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(Path(environment["DETECTRON2_DATASETS"], "gnp_shapes"), own)
    out, empty = tmp_path / "out", environment | {"DETECTRON2_DATASETS": str(tmp_path / "none")}
    options = [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "OUTPUT_DIR", str(out)]
    done = run(empty, *CONFIG, "--data", str(own), "--num-gpus", "2", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MODEL.ROI_HEADS.NUM_CLASSES 4, " in done.stdout and "panoptic_seg PQ" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_evaluation_resume_and_one_line_about_the_missing_gpu(environment, tmp_path):
    done = run(environment, *CONFIG, *TINY, "OUTPUT_DIR", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("No GPU is available") == 1
    (last,) = (
        line for line in done.stdout.splitlines() if "Group counts: " in line and "AP" in line
    )
    assert "bbox AP" in last and "panoptic_seg PQ" in last and "predictions.png" in last
    again = run(environment, *CONFIG, "--eval-only", "--resume", *TINY, "OUTPUT_DIR", str(tmp_path))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "model_final.pth" in again.stdout and "panoptic_seg" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("start", ["num-gpus", "torchrun"])
def test_two_processes_on_the_cpu(environment, tmp_path, start):
    opts = [*TINY, "DATASETS.TEST", "('gnp_shapes_val',)", "OUTPUT_DIR", str(tmp_path)]
    if start == "torchrun":
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        done = run(environment, *CONFIG, *opts, launcher=launcher)
    else:
        done = run(environment, *CONFIG, "--num-gpus", "2", *opts)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    log = (tmp_path / "log.txt").read_text()
    assert "World size: 2" in log
    assert "Evaluation results" in done.stdout
    assert (tmp_path / "model_final.pth").exists()
    assert done.stdout.count("No GPU is available") == 1


@pytest.mark.slow
def test_killed_and_resumed(environment, tmp_path, kill_after):
    opts = [*TINY, "SOLVER.MAX_ITER", "12", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)]
    command = [sys.executable, TOOL, *CONFIG, *opts]
    kill_after(command, environment, tmp_path / "model_0000002.pth")
    assert not (tmp_path / "model_final.pth").exists()
    before = json.loads((tmp_path / "groups.json").read_text())
    done = run(environment, *CONFIG, "--resume", *opts)
    assert done.returncode == 0, done.stderr[-2000:]
    assert iterations(tmp_path)[-1] == 11
    assert json.loads((tmp_path / "groups.json").read_text()) == before
    assert "Starting training from iteration 0" not in done.stdout


@pytest.mark.slow
def test_several_machines_need_an_address(environment, tmp_path):
    done = run(environment, *CONFIG, "--num-machines", "2", "OUTPUT_DIR", str(tmp_path))
    assert done.returncode == 1
    assert "--dist-url tcp://" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
