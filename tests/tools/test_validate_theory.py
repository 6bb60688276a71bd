import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "validate_theory.py", *args],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_gains(tmp_path):
    file = tmp_path / "gains.csv"
    done = run("gains", "--samples", "2000", "--seed", "1", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    assert "* 5 of 99 paper values" in done.stdout
    rows = list(csv.DictReader(file.open(newline="")))
    assert len(rows) == 99
    assert sum(r["near_paper"] == "False" for r in rows) == 5
    tanh = next(r for r in rows if (r["activation"], r["sigma"]) == ("Tanh", "1.0"))
    assert (tanh["quantity"], tanh["samples"], tanh["paper"]) == ("F", "2000", "0.394")
    assert f"{float(tanh['sampled']):.6f}" in done.stdout


@pytest.mark.parametrize(
    "args, expected",
    [
        (["gains", "--samples", "10"], "error: samples must be at least 1000, got 10"),
        (["gains", "--csv", "no/such/folder/x.csv"], "no/such/folder/x.csv"),
    ],
)
def test_bad_input_in_one_line(args, expected):
    done = run(*args)
    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
