import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ["--config-file", "configs/quick/pfpn_gnp_shapes.yaml"]
TINY = (
    "MODEL.FPN.OUT_CHANNELS 32 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 "
    "SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.001 DATALOADER.NUM_WORKERS 0"
).split()
NO_GROUP_NORM = (
    "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN "
    "MODEL.ROI_BOX_HEAD.NORM BN MODEL.ROI_MASK_HEAD.NORM BN MODEL.SEM_SEG_HEAD.NORM BN"
).split()


def run(environment, tool, *args):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


try:
    import detectron2.modeling  # noqa: F401

    MISSING = False
except ImportError:
    MISSING = True
needs_detectron2 = pytest.mark.skipif(MISSING, reason="Detectron2 is not installed")


@needs_detectron2
@pytest.mark.slow
def test_rows_are_trained_once_and_compared(environment, tmp_path, error_of):
    args = [*CONFIG, "--groups", "32", "measured", "--seeds", "1", "--output", tmp_path, *TINY]
    first = run(environment, "compare_groups.py", *args, "SOLVER.MAX_ITER", "2")
    assert first.returncode == 0, first.stderr[-2000:]
    table = (tmp_path / "table.txt").read_text()
    assert table in first.stdout
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["32", "measured"]
    assert "bbox/AP: differences beyond the noise" in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"32", "measured"}
    assert "panoptic_seg/PQ" in results["32"][0]["scores"]
    assert results["32"][0]["peak_memory_mib"] > 100
    assert (tmp_path / "learning_curves.png").stat().st_size > 0
    for row, norm in {"32": "GN_32", "measured": "GN_MEASURED"}.items():
        groups = json.loads((tmp_path / row / "seed1" / "groups.json").read_text())
        assert {g["norm"] for g in groups} == {norm}

    # What has finished is not trained again; what was interrupted goes on.
    weights = tmp_path / "32/seed1/model_final.pth"
    written = weights.stat().st_mtime_ns
    (tmp_path / "measured/seed1/result.json").unlink()
    again = run(environment, "compare_groups.py", *args, "SOLVER.MAX_ITER", "2")
    assert again.returncode == 0, again.stderr[-2000:]
    assert weights.stat().st_mtime_ns == written
    assert "Loading trainer from" in (tmp_path / "measured/seed1/log.txt").read_text()

    other = error_of("compare_groups.py", *args, "SOLVER.MAX_ITER", "3")
    assert "holds a run with another config" in other and "MAX_ITER: 3" in other
    damaged = tmp_path / "32/seed1/result.json"
    sound = json.loads(damaged.read_text())
    for text in ("{", "[]", json.dumps(sound | {"losses": []}), json.dumps(sound | {"scores": 5})):
        damaged.write_text(text)
        error = error_of("compare_groups.py", *args, "SOLVER.MAX_ITER", "2")
        assert f"{damaged} is damaged" in error


@needs_detectron2
@pytest.mark.parametrize(
    "tool, args, expected",
    [
        (
            "compare_groups.py",
            ["--groups", "many", "--output", "{tmp}"],
            "--groups takes practical, closest",
        ),
        ("compare_groups.py", ["--seeds", "0", "--output", "{tmp}"], "--seeds must be at least 1"),
        ("compare_groups.py", ["--groups", "48", "--output", "{tmp}", *TINY], "row 48: GN_48"),
        ("compare_groups.py", ["--output", "{tmp}", *NO_GROUP_NORM], "has no GroupNorm"),
        ("compare_groups.py", ["--output", "{tmp}", "SEED", "7"], "SEED is set by the comparison"),
        (
            "compare_groups.py",
            ["--output", "{tmp}", "MODEL.FPN.NORM", "GN_16"],
            "MODEL.FPN.NORM is set by the comparison",
        ),
        ("measure_gradients.py", ["--groups", "many", "--output", "{tmp}"], "--groups takes"),
        ("measure_gradients.py", ["--batches", "0", "--output", "{tmp}"], "--batches must be"),
        ("measure_gradients.py", ["--output", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bad_input_in_one_line(tmp_path, error_of, tool, args, expected):
    args = [*CONFIG, *(a.format(tmp=tmp_path / "out") for a in args)]
    assert expected in error_of(tool, *args)


@needs_detectron2
@pytest.mark.slow
def test_gradients_are_measured_for_every_row(environment, tmp_path):
    rows = ["--groups", "1", "measured", "--batches", "1"]
    done = run(environment, "measure_gradients.py", *CONFIG, *rows, "--output", tmp_path, *TINY)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "gradients.csv").read_text().splitlines()
    layers = sum(line.startswith("1,") for line in lines)
    assert len(lines) == 1 + 2 * layers and layers > 20
    assert lines[0].startswith("row,layer,in,out,G,rho,K(1),K(32),K(G),")
    assert "K measured" in done.stdout and "law: correlation" in done.stdout
    for name in ("gradients.png", "predicted.png"):
        assert (tmp_path / name).stat().st_size > 0


QUICK = ["--torchvision", "--quick", "--min-size", "64", "--lr", "0.001"]


@pytest.mark.slow
def test_a_search_on_torchvision(environment, tmp_path, error_of):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    args = ["--search", "--groups", "cpg_8", "1", "--output", tmp_path, *QUICK]
    done = run(environment, "compare_groups.py", *args, "--iterations", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The search cost 1.50 trainings instead of 2." in done.stdout
    lines = (tmp_path / "search.txt").read_text().splitlines()
    assert lines[0].startswith("Compared by PQ") and lines[1].split() == "G at 1 at 2".split()
    assert (tmp_path / "search.png").stat().st_size > 0
    for row, norm in {"cpg_8": "GN_CPG_8", "1": "GN_1"}.items():
        groups = json.loads((tmp_path / row / "seed1" / "groups.json").read_text())
        assert {g["norm"] for g in groups} == {norm}
        assert (tmp_path / row / "seed1" / "result_1.json").exists()
    finished = [row for row in ("cpg_8", "1") if (tmp_path / row / "seed1/result.json").exists()]
    assert f"Best: {finished[0]}." in done.stdout and len(finished) == 1
    for changed in (["--iterations", "4"], ["--iterations=2", "--batch-size", "1"]):
        assert "use another --output" in error_of("compare_groups.py", *args, *changed)


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "give either --config-file FILE, or --torchvision and its options"),
        ([*QUICK, "--norm", "BN"], "--norm is set by the comparison: leave it out"),
        ([*QUICK, "--norm=BN"], "--norm is set by the comparison: leave it out"),
        (["--search", *QUICK, "--iterations=0"], "--iterations must be at least 1, got 0"),
        (["--search", "--groups", "48", *QUICK], "row 48: GN_48"),
        (["--search", "--storage", "nonsense", *QUICK], "ArgumentError: Could not parse"),
        (["--groups", "many", *QUICK], "--groups takes practical, closest"),
    ],
)
def test_bad_input_on_torchvision(tmp_path, error_of, args, expected):
    assert expected in error_of("compare_groups.py", "--output", tmp_path, *args)
