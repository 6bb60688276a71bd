"""The best row by successive halving: all rows start, and the worse half stops at each rung.

Source: "Non-stochastic Best Arm Identification and Hyperparameter Optimization", arXiv 1502.07943.
Optuna keeps what has been found, so that an interrupted search goes on and several machines work
on one.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from tabulate import tabulate

from gnpractical.measure.plots import learning_curves
from gnpractical.paper.comparison import mean_and_spread, significant_differences
from gnpractical.runs.output_dir import write_text

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError:
    raise ImportError("a search needs Optuna: pip install optuna") from None

Scores = Mapping[tuple[str, int], Sequence[float]]  # of a row at a stop, one for each seed

POLL_SECONDS = 2
_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


def stops_of(iterations: int, num_rows: int) -> list[int]:
    """At which iterations rows are compared: halves of halves, until one row is left.

    8 rows are compared at 1/8, 1/4 and 1/2 of ``iterations``, and cost 2.5 trainings.
    """
    halvings = max(num_rows - 1, 0).bit_length()
    return sorted({max(1, round(iterations / 2**k)) for k in range(halvings + 1)})


def next_rung(scores: Scores, rows: Sequence[str], stops: Sequence[int]) -> tuple[int, list[str]]:
    """Up to which iteration which rows are to be trained, as far as ``scores`` say.

    Returns:
        The first stop at which a row that is still in the race has no score, and all rows that
        are; the last stop and the winner when there is nothing left to train.
    """
    race = list(rows)
    for stop in stops:
        if any((row, stop) not in scores for row in race):
            return stop, race
        means = {row: _mean(scores[row, stop]) for row in race}
        race.sort(key=lambda row: means[row], reverse=True)
        race = race[: math.ceil(len(race) / 2)] if stop != stops[-1] else race[:1]
    return stops[-1], race


def is_finished(scores: Scores, rows: Sequence[str], stops: Sequence[int]) -> bool:
    stop, race = next_rung(scores, rows, stops)
    return all((row, stop) in scores for row in race)


def cost_of(scores: Scores, stops: Sequence[int]) -> float:
    """What was trained, in trainings of one row with all its seeds."""
    furthest: dict[str, int] = {}
    for row, stop in scores:
        furthest[row] = max(stop, furthest.get(row, 0))
    return sum(furthest.values()) / stops[-1]


def curves_of(scores: Scores) -> dict[str, dict[int, float]]:
    """The mean score at each stop, by row."""
    curves: dict[str, dict[int, float]] = {}
    for (row, stop), values in sorted(scores.items(), key=lambda item: item[0][1]):
        curves.setdefault(row, {})[stop] = fmean(values)
    return curves


def format_search(scores: Scores, rows: Sequence[str], stops: Sequence[int]) -> str:
    """Format a table of rows and stops, the best row, and what can be said of the noise."""
    table = [[row, *(mean_and_spread(scores.get((row, s), ())) for s in stops)] for row in rows]
    text = tabulate(table, ["G", *(f"at {stop}" for stop in stops)], disable_numparse=True)
    for stop in stops:
        samples = {row: scores[row, stop] for row in rows if (row, stop) in scores}
        if len(samples) > 1 and min(map(len, samples.values())) > 1:
            found = significant_differences(samples)
            text += f"\nAt {stop}, differences beyond the noise (Tukey's test, 5%): {found}"
    if max(map(len, scores.values())) == 1:
        text += "\nOf one seed the noise is not known: --seeds 2 or more tells."
    _, (best,) = next_rung(scores, rows, stops)
    cost = cost_of(scores, stops)
    return f"{text}\nBest: {best}. The search cost {cost:.2f} trainings instead of {len(rows)}."


def find_best(
    rows: Sequence[str],
    iterations: int,
    train: Callable[[str, int], Sequence[float]],
    output: Path,
    storage: str | None = None,
    settings: Mapping[str, Any] | None = None,
    score: str = "score",
) -> str:
    """Find the best of ``rows`` and write ``search.txt`` and ``search.png`` to ``output``.

    Args:
        iterations: Of a whole training.
        rows, train, settings: As of :func:`search`.
        storage: As of it; by default ``search.db`` in ``output``.
        score: What the scores are, for the picture.

    Returns:
        What :func:`format_search` says, and where it was written.

    Raises:
        ValueError: As :func:`search`.
    """
    stops = stops_of(iterations, len(rows))
    output.mkdir(parents=True, exist_ok=True)
    # The folder may have another path on another machine.
    url = storage or f"sqlite:///{output.resolve()}/search.db"
    name = output.resolve().name if storage else "search"
    with warnings.catch_warnings():  # that Optuna may change how it finds dead machines
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        scores = search(rows, stops, train, url, name, settings)
    text = f"Compared by {score}.\n{format_search(scores, rows, stops)}"
    write_text(output / "search.txt", text + "\n")
    picture = output / "search.png"
    learning_curves(curves_of(scores), picture, score, xlabel="trained to", yscale="linear")
    return f"{text}\nWritten to {output}: search.txt, search.png"


def search(
    rows: Sequence[str],
    stops: Sequence[int],
    train: Callable[[str, int], Sequence[float]],
    storage: str,
    name: str,
    settings: Mapping[str, Any] | None = None,
) -> Scores:
    """Find the best of ``rows``.

    Args:
        rows: Their names.
        stops: From :func:`stops_of`.
        train: Called with a row and a stop, trains up to it, from where the row stopped before,
            and gives the scores, one for each seed; more is better.
        storage: Where Optuna keeps the study, such as ``sqlite:///search.db``.
        name: The study's. A study of this name goes on.
        settings: What else all trainings share, as plain numbers and strings.

    Returns:
        All scores.

    Raises:
        ValueError: The study of this name has other rows, stops or settings.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Whose machine is no longer heard of has its training done again by others.
    kept = optuna.storages.RDBStorage(storage, heartbeat_interval=20, grace_period=60)
    study = optuna.create_study(
        storage=kept, study_name=name, direction="maximize", load_if_exists=True
    )
    plan = dict(settings or {}) | {"rows": list(rows), "stops": list(stops)}
    held = study.user_attrs.get("plan", plan)
    if held != plan:
        raise ValueError(
            f"{storage} holds another search ({_difference(held, plan)}): use another --output"
        )
    study.set_user_attr("plan", plan)

    # SQLite may hand one trial to two processes. Held until the trial has begun.
    lock: Any = contextlib.nullcontext()
    if storage.startswith("sqlite:///"):
        lock = FileLock(f"{storage.removeprefix('sqlite:///')}.lock")
    begun = contextlib.ExitStack()

    def objective(trial: optuna.Trial) -> float:
        begun.close()
        row = str(trial.suggest_categorical("row", list(rows)))
        stop = int(trial.suggest_categorical("stop", list(stops)))
        # Two machines may have asked for the same at once: the first one does it.
        live = study.get_trials(deepcopy=False, states=_LIVE)
        if any(_asked(t) == (row, stop) and t.number < trial.number for t in live):
            raise optuna.TrialPruned
        try:
            scores = list(train(row, stop))
        except SystemExit:  # so that nobody has to wait for this machine
            study.tell(trial, state=TrialState.FAIL)
            raise
        trial.set_user_attr("scores", scores)
        print(f"G {row} at {stop}: {mean_and_spread(scores)}", flush=True)
        return _mean(scores)

    waiting = False
    while not is_finished(scores := _scores(study), rows, stops):
        optuna.storages.fail_stale_trials(study)
        stop, race = next_rung(scores, rows, stops)
        with begun:
            begun.enter_context(lock)
            live = {_asked(trial) for trial in study.get_trials(deepcopy=False, states=_LIVE)}
            for row in race:
                if (row, stop) not in live:
                    asked = {"row": row, "stop": stop}
                    study.enqueue_trial(asked, user_attrs={"asked": asked})
            if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.optimize(objective, n_trials=1)
                waiting = False
                continue
        if not waiting:
            print("Waiting for other machines, or a minute for one that was killed", flush=True)
        waiting = True
        time.sleep(POLL_SECONDS)
    return scores


def _difference(held: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """The first line in which two plans differ."""
    for key in {**held, **plan}:
        then, now = (str(p.get(key)).splitlines() for p in (held, plan))
        for a, b in zip_longest(then, now, fillvalue=""):
            if a != b:
                return f"{key}: {a.strip()!r} then, {b.strip()!r} now"
    return "in its order"


def _mean(scores: Sequence[float]) -> float:
    """Less than any other where there is none."""
    mean = fmean(scores)
    return -math.inf if math.isnan(mean) else mean


def _asked(trial: FrozenTrial) -> tuple[str, int] | None:
    asked = trial.user_attrs.get("asked")
    return (asked["row"], asked["stop"]) if asked else None


def _scores(study: optuna.Study) -> dict[tuple[str, int], list[float]]:
    found = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        asked = _asked(trial)
        if asked:
            found[asked] = trial.user_attrs["scores"]
    return found
