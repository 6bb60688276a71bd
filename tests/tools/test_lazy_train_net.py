"""tools/lazy_train_net.py: a run, its end by SIGKILL, resuming, evaluation, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from helpers.lazy_tiny import TINY

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "lazy_train_net.py")


def words(name, *more):
    """The words of a command, with {root} and {out} to be filled in."""
    options, overrides = [w for w in more if w[0] == "-"], [w for w in more if w[0] != "-"]
    config = ["--config-file", f"{{root}}/configs/lazy/{name}.py", *options]
    return " ".join([*config, *TINY[name], "train.output_dir={out}", *overrides])


def command(name, out, *more):
    return [sys.executable, TOOL, *words(name, *more).format(root=ROOT, out=out).split()]


def run(environment, *args):
    return subprocess.run(
        command(*args), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200
    )


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_killed_resumed_and_evaluated(environment, tmp_path, kill_after, refused, name):
    if "LSJ" in name:
        pytest.importorskip("shapely", reason="shapely, which crops polygons, is not installed")
    out = tmp_path / "out"
    kill_after(command(name, out), environment, out / "last_checkpoint")
    assert not (out / "model_final.pth").exists()
    before = json.loads((out / "groups.json").read_text())
    assert {row["norm"] for row in before} == {"GN_PRACTICAL"}

    last = refused("lazy_train_net.py", words(name, "--resume", "model.backbone.norm=GN_4"))
    assert "was trained with other group counts" in last
    assert "To match the file: model.backbone.norm=GN_PRACTICAL. " in last

    done = run(environment, name, out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    log = (out / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1 and "Group counts:" in log
    assert json.loads((out / "groups.json").read_text()) == before
    assert [m["iteration"] for m in metrics_of(out) if "total_loss" in m][-1] == 9
    trained = metrics_of(out)[-1]
    assert ("panoptic_seg/PQ" in trained) == name.startswith("pfpn")
    for file in (".lock", "model_final.pth", "config.yaml", "inference/predictions.png"):
        assert (out / file).stat().st_size > 0

    again = run(environment, name, out, "--eval-only", "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"bbox AP {trained['bbox/AP']:.1f}" in again.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_whole_gnp_section_in_two_processes(environment, tmp_path):
    gnp = "gnp.accumulate=2 gnp.probe_period=2 gnp.stop_at=2 gnp.weight_standardization=[backbone]"
    more = [*gnp.split(), "model.backbone.norm=GN_MEASURED", "train.device=cuda"]
    more += ["dataloader.test.dataset.names=[]"]
    done = run(environment, "pfpn_gnp_full", tmp_path, "--num-gpus=2", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("No GPU is available") == 1
    assert "Calibrating 8 GN_MEASURED norms on 2 batches" in done.stdout
    (steps,) = (m for m in metrics_of(tmp_path) if "total_loss" in m)
    assert steps["iteration"] == 1 and "gradient_variance_ratio/mean_abs_log" in steps
    rows = json.loads((tmp_path / "groups.json").read_text())
    standardized = {r["name"].split(".")[0] for r in rows if r["weight_standardized"]}
    assert standardized == {"backbone"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("dataloader.train.dataset.names=gnp_shape_train", "Did you mean 'gnp_shapes_train'?"),
        ("dataloader.train.dataset.names=[]", "dataloader.train.dataset.names must name a data"),
        ("model.roi_heads.num_classes=3", "set model.roi_heads.num_classes=4, not 3"),
        ("model.backbone.norm=GN_FEW", "error: model.backbone.norm: Unknown norm 'GN_FEW'"),
        ("train.max_itr=3", "the nearest valid key is train.max_iter"),
        ("gnp.match_batch=2", "the nearest valid key is gnp.match_batches"),
        ("gnp.weight_standardization=[bone]", "error: gnp.weight_standardization: "),
        ("train.output_dir=/dev/null/x", "error: train.output_dir '/dev/null/x' cannot be written"),
    ],
)
def test_errors_are_one_line(refused, override, message):
    assert message in refused("lazy_train_net.py", words("pfpn_gnp_full", override))


def test_a_missing_file(refused):
    assert "Config file 'no.py' does not exist" in refused(
        "lazy_train_net.py", "--config-file no.py"
    )


def test_nothing_to_evaluate(refused):
    line = refused("lazy_train_net.py", words("pfpn_gnp_full", "--eval-only", "--resume"))
    assert "There is nothing to evaluate: train.init_checkpoint is empty" in line
