import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "validate_theory.py", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.slow
def test_gains(tmp_path):
    file = tmp_path / "gains.csv"
    done = run("gains", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    assert "* 5 of 99 paper values" in done.stdout
    rows = list(csv.DictReader(file.open(newline="")))
    assert len(rows) == 99
    assert sum(r["near_paper"] == "False" for r in rows) == 5
    tanh = next(r for r in rows if (r["activation"], r["sigma"]) == ("Tanh", "1.0"))
    assert (tanh["quantity"], tanh["paper"]) == ("F", "0.394")
    assert f"{float(tanh['integral']):.6f}" in done.stdout


def rows_of(tmp_path, command, trials):
    """What the command prints, and the rows that it writes; its figure is there, too."""
    file, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    done = run(command, "--trials", trials, "--csv", str(file), "--plot", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 0
    return done.stdout, list(csv.DictReader(file.open(newline="")))


@pytest.mark.slow
def test_gradients(tmp_path):
    printed, rows = rows_of(tmp_path, "gradients", "1")
    assert len(rows) == 11 * 5
    first = [rows[0][name] for name in ("in_channels", "out_channels", "num_groups", "equation")]
    assert first == ["1024", "512", "128", "A"]
    assert f"{float(rows[0]['measured']):.4f}" in printed
    assert printed.splitlines()[-1].split()[:5] == ["512", "1024", "512", "1", "D"]


@pytest.mark.slow
def test_convolutions(tmp_path):
    printed, rows = rows_of(tmp_path, "convolutions", "2")
    assert len(rows) == 11 * 6
    assert "Largest error of the law: " in printed
    for row in rows:
        assert float(row["law"]) == pytest.approx(float(row["measured"]), rel=0.12)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["gradients", "--trials", "0"], "error: trials must be at least 1, got 0"),
        (["convolutions", "--trials", "1"], "error: trials must be at least 2"),
        (["gains", "--csv", "no/such/folder/x.csv"], "no/such/folder/x.csv"),
    ],
)
def test_bad_input_in_one_line(args, expected, error_of):
    assert expected in error_of("validate_theory.py", *args)
