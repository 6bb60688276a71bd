import json

import pytest

from gnpractical.paper.training_run import Diverged, train_once

LINES = [{"iteration": 1, "total_loss": 2.0, "time": 0.1}, {"iteration": 3, "total_loss": 1.0}]
SCRIPT = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
for line in json.loads(sys.argv[2]):
    with open(folder / "metrics.json", "a") as f:
        print(json.dumps(line), file=f)
(folder / "log.txt").write_text("max_mem: 7M")
sys.exit(sys.argv[3] if len(sys.argv) > 3 else 0)
"""


@pytest.fixture
def command(tmp_path):
    """A training that only writes what one leaves."""

    def command(lines, *error):
        (tmp_path / "train.py").write_text(SCRIPT)
        return [str(tmp_path / "train.py"), str(tmp_path / "run"), json.dumps(lines), *error]

    return command


def test_what_a_run_left_is_read_once(command, tmp_path):
    score = {"iteration": 3, "bbox/AP": 12.5}
    result = train_once(command([*LINES, score]), tmp_path / "run", "lr: 1")
    assert result["scores"] == {"bbox/AP": 12.5} and result["losses"] == [(1, 2.0), (3, 1.0)]
    assert result["seconds_per_step"] == 0.1 and result["peak_memory_mib"] == 7
    again = train_once(command([], "error: not again"), tmp_path / "run", "lr: 1")
    assert again["scores"] == result["scores"]
    with pytest.raises(ValueError, match="another config .now 'lr: 2'"):
        train_once(command([]), tmp_path / "run", "lr: 2")


def test_every_stop_has_its_result_and_none_is_behind_the_run(command, tmp_path):
    train_once(command(LINES[:1]), tmp_path / "run", "", stop_at=2)
    train_once(command(LINES[1:]), tmp_path / "run", "", stop_at=4)
    assert {p.name for p in (tmp_path / "run").glob("*.json")} == {
        "metrics.json",
        "result_2.json",
        "result_4.json",
    }
    with pytest.raises(ValueError, match="past iteration 3: use another --output"):
        train_once(command([]), tmp_path / "run", "", stop_at=3)


def test_a_run_that_fails_says_why(command, tmp_path):
    with pytest.raises(ChildProcessError, match="the run failed, see .*output.txt: the disk is"):
        train_once(command([], "error: the disk is full"), tmp_path / "run", "")
    with pytest.raises(Diverged, match="The loss became nan at iteration 7"):
        train_once(command([], "error: The loss became nan at iteration 7"), tmp_path / "run", "")
