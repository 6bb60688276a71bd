import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

ROOT = Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "report_groups.py", *args],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_table_json_and_csv_agree():
    config = ["--config-file", "configs/pfpn_gnp.yaml"]
    table, data, rows = (run(*config, "--format", f) for f in ("table", "json", "csv"))
    assert table.stdout.splitlines()[-1].startswith("7 GroupNorm layers: G=1 in 3, G=C in 0")
    data = json.loads(data.stdout)
    assert [(d["in_channels"], d["out_channels"], d["num_groups"]) for d in data][1] == (
        256, 128, 32
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(rows.stdout)))
    assert [r["name"] for r in rows] == [d["name"] for d in data]
    assert rows[0]["flags"] == data[0]["flags"]


def test_overrides_and_frozen_layers():
    done = run(
        "--config-file", "configs/pfpn_gnp.yaml", "--format", "json",
        "MODEL.RESNETS.NORM", "GN_PRACTICAL", "MODEL.RESNETS.DEPTH", "50",
    )  # fmt: skip
    data = json.loads(done.stdout)
    assert len(data) == 53 + 7
    assert sum(d["frozen"] for d in data) == 11  # the stem and res2


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--config-file", "none.yaml"], "'none.yaml' does not exist"),
        (["MODEL.RESNETS.NORM", "GN_PRATICAL"], "Did you mean 'GN_PRACTICAL'"),
        (["MODEL.RESNETS.NORM", "GN_48"], "48 groups do not divide 64 channels"),
        (["MODEL.RESNETS.DEPTH", "18"], "RES2_OUT_CHANNELS = 64"),
    ],
)
def test_bad_input_in_one_line(args, expected):
    done = run(*args)
    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
