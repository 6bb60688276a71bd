import csv
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

ROOT = Path(__file__).parents[2]
CONFIG = ["--config-file", "configs/pfpn_gnp.yaml"]


@pytest.fixture
def output_of(monkeypatch, capsys):
    """A function (*args) -> what the tool prints. In this process: a new one takes seconds."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["report_groups.py", *args])
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(ROOT / "tools" / "report_groups.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_table_json_and_csv_agree(output_of):
    table, data, rows = (output_of(*CONFIG, "--format", f) for f in ("table", "json", "csv"))
    assert table.splitlines()[-1].startswith("7 GroupNorm layers: G=1 in 3, G=C in 0")
    data = json.loads(data)
    widths = [(d["in_channels"], d["out_channels"], d["num_groups"]) for d in data]
    assert widths[1] == (256, 128, 32)
    rows = list(csv.DictReader(io.StringIO(rows)))
    assert [r["name"] for r in rows] == [d["name"] for d in data]
    assert rows[0]["flags"] == data[0]["flags"]


def test_overrides_and_frozen_layers(output_of):
    overrides = ["MODEL.RESNETS.NORM", "GN_PRACTICAL", "MODEL.RESNETS.DEPTH", "50"]
    data = json.loads(output_of(*CONFIG, "--format", "json", *overrides))
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
def test_bad_input_in_one_line(args, expected, error_of):
    assert expected in error_of("report_groups.py", *args)
