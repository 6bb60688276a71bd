import pytest

from gnpractical.paper.gain_table import GainRow, format_gains, gain_table


@pytest.fixture(scope="module")
def rows():
    return gain_table()


def key(row):
    return row.activation, row.sigma, row.quantity


def test_one_row_for_each_entry_of_table_2(rows):
    paper = {key(r): r.paper for r in rows}
    assert len(rows) == len(paper) == 99
    # spot checks against the printed table
    assert paper["ReLU", 0.1, "F"] == 0.500
    assert paper["Sigmoid", 0.1, "F"] == 25.079
    assert paper["Tanh", 10, "B/F"] == 5.780
    assert paper["LogSigmoid", 10, "B/F"] == 0.921
    assert paper["SELU", 1, "B"] == 1.071


def test_the_ratio_is_that_of_the_gains(rows):
    values = {key(r): r.integral for r in rows}
    for (name, sigma, quantity), ratio in values.items():
        if quantity == "B/F":
            assert ratio == pytest.approx(values[name, sigma, "B"] / values[name, sigma, "F"])


def test_five_entries_of_the_paper_are_outside(rows):
    assert [key(r) for r in rows if not r.near_paper] == [
        ("Sigmoid", 0.1, "F"),
        ("Softplus", 0.1, "F"),
        ("LogSigmoid", 0.1, "F"),
        ("Tanh", 10.0, "B/F"),
        ("Softsign", 10.0, "B/F"),
    ]


def test_near_paper_is_two_units_of_the_last_digit():
    assert GainRow("ReLU", 1.0, "F", integral=0.5019, paper=0.5).near_paper
    assert not GainRow("ReLU", 1.0, "F", integral=0.4979, paper=0.5).near_paper


def test_format(rows):
    text = format_gains(rows)
    assert "0.1  Sigmoid       F        25.062190   25.079" in text
    line = next(line for line in text.splitlines() if "48.438" in line)
    assert "-0.0308" in line and line.rstrip().endswith("*")
    assert "* 5 of 99 paper values differ from the integral by more than 0.002." in text
    near = format_gains(r for r in rows if r.near_paper)
    assert near.count("*") == 1 and "* 0 of 94 paper values" in near
