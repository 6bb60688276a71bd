import multiprocessing
import time

import pytest

pytest.importorskip("optuna", reason="Optuna is not installed")

from gnpractical.paper.search import (
    cost_of,
    curves_of,
    format_search,
    is_finished,
    next_rung,
    search,
    stops_of,
)

ROWS = ["a", "b", "c", "d", "e", "f", "g", "h"]
STOPS = [100, 200, 400, 800]


def score(row, stop):
    """The later in the alphabet the better in the end, but at first "d" is the best."""
    return [ROWS.index(row) * stop / 800 + (row == "d") * 5 * (stop == 100)]


@pytest.fixture
def storage(tmp_path):
    return f"sqlite:///{tmp_path}/search.db"


def test_stops():
    assert stops_of(800, 8) == STOPS
    assert stops_of(800, 5) == STOPS and stops_of(800, 4) == [200, 400, 800]
    assert stops_of(800, 1) == [800]
    assert stops_of(3, 8) == [1, 2, 3]


def test_the_worse_half_stops_at_each_rung(storage):
    trained = []

    def train(row, stop):
        trained.append((row, stop))
        return score(row, stop)

    scores = search(ROWS, STOPS, train, storage, "a")
    assert sorted(trained[:8]) == [(row, 100) for row in ROWS]
    assert sorted(trained[8:12]) == [(row, 200) for row in "dfgh"]
    assert sorted(trained[12:14]) == [("g", 400), ("h", 400)]
    assert trained[14:] == [("h", 800)]
    assert next_rung(scores, ROWS, STOPS) == (800, ["h"]) and is_finished(scores, ROWS, STOPS)
    assert cost_of(scores, STOPS) == 2.5
    assert curves_of(scores)["g"] == {100: 0.75, 200: 1.5, 400: 3.0}
    text = format_search(scores, ROWS, STOPS)
    assert "Best: h. The search cost 2.50 trainings instead of 8." in text
    assert "Of one seed the noise is not known" in text
    assert search(ROWS, STOPS, None, storage, "a") == scores  # nothing is left to train


def test_an_interrupted_search_goes_on(storage):
    trained = []

    def failing(row, stop):
        if len(trained) == 5:
            raise KeyError("interrupted")
        trained.append((row, stop))
        return score(row, stop)

    with pytest.raises(KeyError):
        search(ROWS, STOPS, failing, storage, "a")
    before, again = list(trained), []

    def train(row, stop):
        again.append((row, stop))
        return score(row, stop)

    search(ROWS, STOPS, train, storage, "a")
    assert len(again) == 10 and not set(again) & set(before)


def test_rows_without_a_score_lose_and_several_seeds_tell_the_noise(storage):
    def train(row, stop):
        values = {"a": 3.0, "b": float("nan"), "c": 1.0}
        return [values[row], values[row] + 0.1]

    scores = search(["a", "b", "c"], [50, 100, 200], train, storage, "nan")
    assert next_rung(scores, ["a", "b", "c"], [50, 100, 200])[1] == ["a"]
    assert ("b", 100) not in scores
    text = format_search(scores, ["a", "b", "c"], [50, 100, 200])
    assert "At 50, differences beyond the noise (Tukey's test, 5%): a over c" in text


def work(storage, path):
    def train(row, stop):
        with open(path, "a") as f:
            f.write(f"{row}{stop}\n")
        time.sleep(0.1)
        return score(row, stop)

    search(ROWS, STOPS, train, storage, "shared")


def test_two_processes_share_a_search(storage, tmp_path, monkeypatch):
    search(ROWS[:1], [1], lambda row, stop: [0.0], storage, "so that the tables are there")
    context = multiprocessing.get_context("spawn")
    args = storage, tmp_path / "trained"
    processes = [context.Process(target=work, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    trained = (tmp_path / "trained").read_text().split()
    assert len(trained) == len(set(trained)) == 15


def test_a_search_of_other_rows(storage):
    search(["a"], [1], lambda row, stop: [0.0], storage, "a")
    with pytest.raises(ValueError, match="holds another search .rows: .* use another --output"):
        search(["a", "b"], [1], None, storage, "a")
