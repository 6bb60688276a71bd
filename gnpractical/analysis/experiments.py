"""Comparisons of group counts by training: rows x seeds, kept in one JSON file, resumable.

A row is a number of groups (``"32"``) or the name of a rule (``"practical"``), as in Tables 3 and
4 of "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv 2302.03193. The
paper's appendix with its hyperparameters is not available, so every recipe here is a choice.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tabulate import tabulate

from gnpractical.analysis.output_dir import write_text
from gnpractical.analysis.training import History
from gnpractical.layers.group_norm import group_norm_from_name, norm_names


@dataclass
class Record(History):
    """One run. Its result is the last epoch's test error, never the best epoch's."""

    row: str = ""
    seed: int = 0
    test_error: float = math.nan


@dataclass(frozen=True)
class RowSummary:
    """A row over its seeds; ``error_std`` is the sample's (n - 1), None for a single run."""

    row: str
    runs: int
    error: float
    error_std: float | None
    train_losses: list[float]  # mean over the seeds, per epoch
    seconds: float


class Results:
    """The records of one experiment in a JSON file, rewritten whole after every run.

    One process at a time may use a file. ``settings`` is what all its runs share, as plain
    numbers and strings. Raises ValueError if the file holds runs with other settings or is not a
    file of this kind, and OSError if it cannot be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = self._read() if self.path.exists() else []
        self._write()  # now, not after the first hour of training

    def run(
        self, rows: Sequence[str], seeds: int, train: Callable[[str, int], History]
    ) -> Iterator[Record]:
        """Every row and seed in turn; ``train(row, seed)`` is called for those not yet held."""
        # Seeds outermost, so that all rows can be compared early.
        for seed, row in itertools.product(range(seeds), rows):
            record = next((r for r in self.records if (r.row, r.seed) == (row, seed)), None)
            if record is None:
                history = train(row, seed)
                record = Record(**vars(history), row=row, seed=seed,
                                test_error=history.test_errors[-1])  # fmt: skip
                self.records.append(record)
                self._write()
            yield record

    def _read(self) -> list[Record]:
        try:
            held = json.loads(self.path.read_text())
            settings = dict(held["settings"])
            records = [Record(**record) for record in held["records"]]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{self.path} must be a results file that this tool wrote, but it cannot be read "
                f"({type(e).__name__}: {e}). Remove it or use another --output."
            ) from None
        for name in {**self.settings, **settings}:
            then, now = settings.get(name), self.settings.get(name)
            if then != now:
                raise ValueError(
                    f"{self.path} holds runs with {name} = {then}, this run has {name} = {now}. "
                    f"Use another --output, or {name} = {then}."
                )
        return records

    def _write(self) -> None:
        data = {
            "settings": self.settings,
            "torch": torch.__version__,
            "records": [vars(r) for r in self.records],
        }
        write_text(self.path, json.dumps(data, indent=1))


def norm_name_of(row: str) -> str:
    """The config string of a row: ``GN_PRACTICAL`` of ``practical``, ``GN_32`` of ``32``."""
    return f"GN_{row.upper()}"


def check_rows(rows: Sequence[str]) -> None:
    """Raise ValueError for a row that is no number and no rule."""
    for row in rows:
        if group_norm_from_name(norm_name_of(row), 1) is None:
            known = ", ".join(n.removeprefix("GN_").lower() for n in norm_names())
            raise ValueError(f"--groups takes {known}; got {row!r}")


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a tool's options; return those on which the result of a run depends.

    Raises:
        ValueError: a number is out of range, or ``groups`` has an unknown row.
    """
    for name, value in options.items():
        may_be_zero = name in ("momentum", "weight_decay", "workers")
        if isinstance(value, int | float) and not (value > 0 or may_be_zero and value == 0):
            raise ValueError(
                f"--{name.replace('_', '-')} must be {'at least' if may_be_zero else 'above'} 0, "
                f"got {value}"
            )
    check_rows(options["groups"])
    without = ("groups", "seeds", "data", "output", "device", "workers")
    return {name: value for name, value in options.items() if name not in without}


def summarize(records: Sequence[Record]) -> list[RowSummary]:
    """One summary a row, in order of first appearance."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    return [
        RowSummary(
            row=row,
            runs=len(runs),
            error=fmean(r.test_error for r in runs),
            error_std=stdev(r.test_error for r in runs) if len(runs) > 1 else None,
            train_losses=[
                fmean(epoch) for epoch in zip(*(r.train_losses for r in runs), strict=True)
            ],
            seconds=fmean(r.seconds for r in runs),
        )
        for row, runs in rows.items()
    ]


def format_summaries(
    summaries: Sequence[RowSummary], labels: Mapping[str, str], paper: Mapping[str, float]
) -> str:
    """The rows as a table, and below it which has the lowest error and the fastest descent.

    ::

        row            runs    test error %    paper    final train loss    s/run
        32                3    1.64 +- 0.05    1.720             0.00210       31
        64 *practical     3    1.59 +- 0.02    1.670             0.00190       33
        Lowest test error: 64 *practical.
        Fastest falling train loss (geometric mean over the epochs): 64 *practical.

    Args:
        labels: what to call a row.
        paper: the paper's error of a row, where it has one.
    """
    table = [
        [
            labels[s.row],
            s.runs,
            f"{s.error:.2f}" + ("" if s.error_std is None else f" +- {s.error_std:.2f}"),
            f"{paper[s.row]:.3f}" if s.row in paper else "-",
            f"{s.train_losses[-1]:.5f}",
            f"{s.seconds:.0f}",
        ]
        for s in summaries
    ]
    headers = ["row", "runs", "test error %", "paper", "final train loss", "s/run"]
    align = ("left", "right", "left", "right", "right", "right")

    def lowest(value: Callable[[RowSummary], float]) -> str:
        best = min(map(value, summaries))
        return ", ".join(labels[s.row] for s in summaries if value(s) == best)

    return (
        f"{tabulate(table, headers, disable_numparse=True, colalign=align)}\n"
        f"Lowest test error: {lowest(lambda s: s.error)}.\n"
        f"Fastest falling train loss (geometric mean over the epochs): {lowest(_mean_log_loss)}."
    )


def _mean_log_loss(summary: RowSummary) -> float:
    """Height of a row's learning curve on a log axis; inf for a run that diverged."""
    if not all(map(math.isfinite, summary.train_losses)):
        return math.inf
    return fmean(math.log(max(loss, 1e-12)) for loss in summary.train_losses)
