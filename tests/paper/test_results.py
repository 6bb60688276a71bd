import json
import math

import pytest

from gnpractical.paper.classifier import History
from gnpractical.paper.results import Results, check_options, format_results
from gnpractical.runs.device import resolve_device


def train(calls):
    def train(row, seed, checkpoint):
        calls.append((row, seed))
        checkpoint.touch()
        return History([1.0, 0.1 * int(row)], [50.0, float(row) + seed], 2.0)

    return train


def test_runs_are_kept_and_not_repeated(tmp_path):
    calls = []
    path = tmp_path / "new" / "results.json"
    first = Results(path, {"lr": 0.1}).run(["1", "2"], 2, train(calls))
    assert calls == [("1", 0), ("2", 0), ("1", 1), ("2", 1)]
    again = Results(path, {"lr": 0.1}).run(["2", "4"], 2, train(calls))
    assert calls[4:] == [("4", 0), ("4", 1)]
    assert again["2"] == first["2"] and [run.test_error for run in again["2"]] == [2.0, 3.0]
    records = json.loads(path.read_text())["records"]
    assert len(records) == 6 and records[3]["test_error"] == 3.0
    assert {p.name for p in path.parent.iterdir()} == {".lock", "results.json"}  # and no checkpoint


def test_an_interrupted_experiment_keeps_what_it_had(tmp_path):
    def interrupted(row, seed, checkpoint):
        checkpoint.touch()
        if row == "2":
            raise KeyboardInterrupt
        return History([1.0], [3.0], 1.0)

    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        Results(path, {}).run(["1", "2"], 1, interrupted)
    assert [r["row"] for r in json.loads(path.read_text())["records"]] == ["1"]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {".lock", "results.json", "checkpoint_2_0.pth"}


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"lr": 0.1, "epochs": 3})
    for settings in ({"lr": 0.1, "epochs": 4}, {"lr": 0.1}):
        with pytest.raises(ValueError, match="epochs = 3, .*another --output"):
            Results(path, settings)


RUN = {"row": "1", "seed": 0, "train_losses": [1.0], "test_errors": [5.0], "seconds": 1.0}
DAMAGED = [
    *({"train_losses": []}, {"train_losses": None}, {"train_losses": ["a"]}, {"seconds": None}),
    *({"test_errors": [900.0]}, {"test_errors": [math.nan]}, {"test_errors": [1.0, 2.0]}),
]
BAD = ["", "[]", "{}", '{"settings": {}, "records": [{"no": 1}]}']
BAD += [json.dumps({"settings": {}, "records": [RUN | damage]}) for damage in DAMAGED]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a results file"):
        Results(path, {})
    assert path.read_text() == text


def test_table_by_hand():
    runs = {
        "8": [History([4.0, 2.0], [9.0, e], 10.0) for e in (1.0, 2.0, 3.0)],
        "16": [History([2.0, 1.0], [9.0, 1.5], 30.0)],
    }
    rows = format_results(runs, {"8": "8 *exact", "16": "16"}, {"8": 1.73}).splitlines()
    assert rows[2].split() == ["8", "*exact", "3", "2.00", "+-", "1.00", "1.730", "2.00000", "10"]
    assert rows[3].split() == ["16", "1", "1.50", "-", "1.00000", "30"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"epochs": 0}, "--epochs must be above 0, got 0"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0"),
        ({"lr": math.nan}, "--lr must be above 0"),
        ({"groups": ["32", "pratical"]}, "practical, .*; got 'pratical'"),
        ({"groups": ["0"]}, "got '0'"),
    ],
)
def test_options_out_of_range(options, expected):
    with pytest.raises(ValueError, match=expected):
        check_options({"groups": ["32", "practical"], "lr": 0.1} | options)


def test_what_does_not_decide_a_result_is_no_setting():
    options = {"groups": ["1"], "seeds": 3, "data": "d", "output": "o", "device": None}
    assert check_options(options | {"workers": 0, "lr": 0.1}) == {"lr": 0.1}


def test_a_missing_device_is_named():
    with pytest.raises(ValueError, match="got 'gpu'.*--device cpu"):
        resolve_device("gpu")
