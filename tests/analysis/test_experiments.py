import json
import math

import pytest
import torch
from torch import nn

from gnpractical.analysis.experiments import (
    Record,
    Results,
    check_options,
    format_summaries,
    summarize,
)
from gnpractical.analysis.training import History, Recipe, error_rate, fit, resolve_device

RECIPE = Recipe(epochs=4, lr=0.1, momentum=0.9, weight_decay=1e-4)


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 6, generator=generator)
    return list(zip(inputs.split(16), (inputs[:, 0] > 0).long().split(16), strict=True))


class Noisy(nn.Sequential):
    """Draws random numbers as it trains, as augmentation does."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 2))


def train(calls):
    def train(row, seed):
        calls.append((row, seed))
        return History([1.0, 0.1 * int(row)], [50.0, float(row) + seed], 2.0)

    return train


def test_runs_are_kept_and_not_repeated(tmp_path):
    calls = []
    path = tmp_path / "new" / "results.json"
    first = list(Results(path, {"lr": 0.1}).run(["1", "2"], 2, train(calls)))
    assert calls == [("1", 0), ("2", 0), ("1", 1), ("2", 1)]
    again = list(Results(path, {"lr": 0.1}).run(["2", "4"], 2, train(calls)))
    assert calls[4:] == [("4", 0), ("4", 1)]
    assert again[0] == first[1] and again[0].test_error == 2.0
    assert len(json.loads(path.read_text())["records"]) == 6


def test_an_interrupted_experiment_keeps_what_it_had(tmp_path):
    def fails(row, seed):
        if row == "2":
            raise KeyboardInterrupt
        return History([1.0], [3.0], 1.0)

    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        list(Results(path, {}).run(["1", "2"], 1, fails))
    assert [r["row"] for r in json.loads(path.read_text())["records"]] == ["1"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"lr": 0.1, "epochs": 3})
    for settings in ({"lr": 0.1, "epochs": 4}, {"lr": 0.1}):
        with pytest.raises(ValueError, match="epochs = 3, .*another --output"):
            Results(path, settings)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "records": [{"no": 1}]}'])
def test_a_bad_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a results file"):
        Results(path, {})
    assert path.read_text() == text


def test_mean_and_sample_deviation_by_hand():
    runs = [Record([4.0, 2.0], [9.0, e], 10.0, "8", i, e) for i, e in enumerate((1.0, 2.0, 3.0))]
    runs.append(Record([2.0, 1.0], [9.0, 1.5], 30.0, "16", 0, 1.5))
    eight, sixteen = summarize(runs)
    assert (eight.runs, eight.error, eight.error_std) == (3, 2.0, 1.0)
    assert eight.train_losses == [4.0, 2.0] and sixteen.error_std is None
    text = format_summaries([eight, sixteen], {"8": "8 *exact", "16": "16"}, {"8": 1.73})
    rows = text.splitlines()
    assert rows[2].split() == ["8", "*exact", "3", "2.00", "+-", "1.00", "1.730", "2.00000", "10"]
    assert rows[3].split() == ["16", "1", "1.50", "-", "1.00000", "30"]
    assert "Lowest test error: 16." in text and "epochs): 16." in text


def test_a_run_that_diverged_does_not_win():
    runs = [
        Record([math.nan], [90.0], 1.0, "1", 0, 90.0),
        Record([0.5], [5.0], 1.0, "2", 0, 5.0),
    ]
    text = format_summaries(summarize(runs), {"1": "1", "2": "2"}, {})
    assert "epochs): 2." in text


def test_fit_learns_and_follows_the_cosine(monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )  # fmt: skip
    history = fit(Noisy(), batches(), batches(), RECIPE, seed=0)
    assert history.test_errors[-1] < 25  # half the labels are either
    assert history.train_losses[-1] < history.train_losses[0]
    assert len(rates) == 16 and rates[0] == 0.1 and rates[8] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.001


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole, parts = Noisy(), Noisy()
    expected = fit(whole, batches(), batches(), RECIPE, seed=3)
    path = tmp_path / "checkpoint.pth"
    steps = []

    def stop(count):
        steps.append(count)
        if len(steps) == 10:  # in the third epoch of four batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, batches(), batches(), RECIPE, seed=3, checkpoint=path, on_step=stop)
    steps.clear()
    torch.rand(5)  # whatever else happened to the random state
    resumed = Noisy()
    history = fit(
        resumed, batches(), batches(), RECIPE, seed=3, checkpoint=path, on_step=steps.append
    )  # fmt: skip
    assert steps == [8] + [1] * 8
    assert history.train_losses == expected.train_losses
    assert history.test_errors == expected.test_errors
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert fit(Noisy(), batches(), batches(), RECIPE, seed=4).train_losses != expected.train_losses


def test_a_bad_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a checkpoint of this run.*Remove it"):
        fit(Noisy(), batches(), batches(), RECIPE, seed=0, checkpoint=path)
    path.unlink()
    fit(Noisy(), batches(), batches(), RECIPE, seed=0, checkpoint=path)
    with pytest.raises(ValueError, match="it is of seed 0, not 1"):
        fit(Noisy(), batches(), batches(), RECIPE, seed=1, checkpoint=path)


def test_error_rate_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])
    model = nn.Identity()
    data = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    assert error_rate(model, data) == 50.0


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
