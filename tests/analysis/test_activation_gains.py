import math
from dataclasses import replace

import pytest
import torch
from scipy.special import expit

from gnpractical.analysis.activation_gains import (
    PAPER_GAINS,
    GainRow,
    format_gains,
    gain_table,
    outside_tolerance,
)

OUTSIDE = [
    ("Sigmoid", 0.1, "F"), ("Softplus", 0.1, "F"), ("LogSigmoid", 0.1, "F"),
    ("Tanh", 10.0, "B/F"), ("Softsign", 10.0, "B/F"),
]  # fmt: skip


def key(row):
    return row.activation, row.sigma, row.quantity


@pytest.fixture(scope="module")
def rows():
    return gain_table(samples=150_000)  # more than a chunk, and not a multiple of it


def test_one_row_for_each_entry_of_table_2(rows):
    assert len(rows) == len(PAPER_GAINS) == 99
    assert {key(r): r.paper for r in rows} == PAPER_GAINS
    # spot checks against the printed table
    assert PAPER_GAINS["ReLU", 0.1, "F"] == 0.500
    assert PAPER_GAINS["Sigmoid", 0.1, "F"] == 25.079
    assert PAPER_GAINS["Tanh", 10, "B/F"] == 5.780
    assert PAPER_GAINS["LogSigmoid", 10, "B/F"] == 0.921
    assert PAPER_GAINS["SELU", 1, "B"] == 1.071


def test_samples_agree_with_the_integrals(rows):
    off = [abs(r.sampled - r.quadrature) / r.standard_error for r in rows]
    assert max(off) < 4
    # and are not trivially equal: normal errors beyond one standard error are a third
    assert 10 < sum(o > 1 for o in off) < 60


def test_the_ratio_is_that_of_the_gains(rows):
    values = {key(r): r for r in rows}
    for (name, sigma, quantity), row in values.items():
        if quantity == "B/F":
            b, f = values[name, sigma, "B"], values[name, sigma, "F"]
            assert row.quadrature == pytest.approx(b.quadrature / f.quadrature)
            assert row.sampled == pytest.approx(b.sampled / f.sampled)


def test_standard_errors_known_by_hand(rows):
    errors = {key(r): r.standard_error for r in rows}
    # ReLU's B is a share of a half: sqrt(1/4 / n)
    assert errors["ReLU", 1.0, "B"] == pytest.approx(math.sqrt(0.25 / 150_000), rel=0.01)
    # F is the share s of x^2 on one side: d(s) = (1-s) a - s b, each with E[x^4]/2 = 3/2
    assert errors["ReLU", 1.0, "F"] == pytest.approx(math.sqrt(0.75 / 150_000), rel=0.03)
    # nearly f(0)^2 over a sampled variance
    relative = errors["Softplus", 0.1, "F"] / (math.log(2) ** 2 / 0.01)
    assert relative == pytest.approx(math.sqrt(2 / 150_000), rel=0.03)


def test_standard_errors_are_the_spread_over_seeds():
    tables = [gain_table(samples=4000, seed=seed) for seed in range(40)]
    off = []
    for entries in zip(*tables, strict=True):
        sampled = torch.tensor([r.sampled for r in entries])
        errors = torch.tensor([r.standard_error for r in entries])
        off.append((sampled.std() / errors.mean()).item())
    # a standard deviation from 40 values is known to a ninth
    assert all(0.6 < o < 1.5 for o in off)
    assert sum(off) / 99 == pytest.approx(1, abs=0.06)


def test_seeds():
    first, again, other = (gain_table(samples=1000, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert [r.sampled for r in first] != [r.sampled for r in other]


def test_five_entries_of_the_paper_are_outside(rows):
    assert [key(r) for r in outside_tolerance(rows)] == OUTSIDE
    assert all((r.note != "") == (key(r) in OUTSIDE) for r in rows)


def test_sampling_noise_explains_every_entry_of_the_paper(rows):
    # beyond the rounding to three decimals
    for r in rows:
        beyond = max(0, abs(r.paper - r.quadrature) - 0.0005)
        assert beyond < 2.5 * r.paper_standard_error, r


def test_what_the_note_says_of_a_known_variance():
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    weights = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * 20 / 20_000
    x = 0.1 * z
    functions = {"Sigmoid": torch.from_numpy(expit(x.numpy())), "Softplus": torch.log1p(x.exp())}
    functions["LogSigmoid"] = functions["Softplus"].flip(0)
    off = []
    for name, f in functions.items():
        gains = (f / 0.1) ** 2
        mean = gains @ weights
        error = math.sqrt((gains - mean).square() @ weights / 10**7)
        off.append(abs(PAPER_GAINS[name, 0.1, "F"] - mean.item()) / error)
    assert [round(o) for o in off] == [21, 14, 12]


def test_near_paper_is_two_units_of_the_last_digit():
    row = GainRow("ReLU", 1.0, "F", 0.5, 0.5, 0.01, 10**5, 0.5)
    assert replace(row, quadrature=0.5019).near_paper
    assert not replace(row, quadrature=0.4979).near_paper
    assert row.paper_standard_error == pytest.approx(0.001)
    # outside, but there is no known reason
    assert replace(row, quadrature=0.4).note == ""


def test_format(rows):
    text = format_gains(rows)
    assert "0.1  Sigmoid       F        25.062190" in text
    assert "* 5 of 99 paper values differ from the integral by more than 0.002:" in text
    assert "Softplus F at 0.1: -0.0308, 1.4 standard errors of 10^7 samples: sampling" in text
    near = [r for r in rows if r.near_paper]
    assert format_gains(near).endswith("* 0 of 94 paper values differ from the integral by more "
                                       "than 0.002")  # fmt: skip


@pytest.mark.parametrize("bad, error", [(999, ValueError), (0, ValueError), (1e7, TypeError)])
def test_bad_samples(bad, error):
    with pytest.raises(error, match="samples must be"):
        gain_table(samples=bad)


def test_prints_nothing_and_reports_progress(capsys):
    seen = []
    gain_table(samples=1000, progress=lambda steps: seen.extend(steps) or steps)
    assert len(seen) == 33
    assert capsys.readouterr() == ("", "")
