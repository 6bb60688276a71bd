"""Comparisons of group counts by training: rows x seeds, kept in one JSON file, resumable.

A row is a number of groups (``"32"``) or the name of a rule (``"practical"``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from gnpractical.layers.group_norm import group_norm_from_name, norm_names
from gnpractical.paper.classifier import History
from gnpractical.paper.comparison import mean_and_spread
from gnpractical.runs.output_dir import claim_output_dir, write_text


class Results:
    """The runs of one experiment in a JSON file, rewritten whole after every run.

    No other process may use its folder until this one ends. ``settings`` is what all its runs
    share, as plain numbers and strings.

    Raises:
        ValueError: The file holds runs with other settings, or is not a file of this kind.
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        claim_output_dir(self.path.parent, "--output")
        self.runs = self._read() if self.path.exists() else {}
        self._write()  # now, not after the first hour of training

    def run(
        self, rows: Sequence[str], seeds: int, train: Callable[[str, int, Path], History]
    ) -> dict[str, list[History]]:
        """Return the runs of every row, one for each seed, training those that are not yet held.

        Args:
            train: Called with a row, a seed, and the path of a checkpoint for this run, which is
                removed once the run is in the file.
        """
        # Seeds outermost, so that all rows can be compared early.
        with tqdm(list(product(range(seeds), rows)), unit="run") as bar:
            for seed, row in bar:
                checkpoint = self.path.with_name(f"checkpoint_{row}_{seed}.pth")
                if (row, seed) not in self.runs:
                    self.runs[row, seed] = train(row, seed, checkpoint)
                    self._write()
                checkpoint.unlink(missing_ok=True)
                run = self.runs[row, seed]
                bar.write(f"G {row}, seed {seed}: {run.test_error:.2f} %, {run.seconds:.0f} s")
        return {row: [self.runs[row, seed] for seed in range(seeds)] for row in rows}

    def _read(self) -> dict[tuple[str, int], History]:
        try:
            held = json.loads(self.path.read_text())
            settings = dict(held["settings"])
            runs = {
                (r["row"], r["seed"]): History(r["train_losses"], r["test_errors"], r["seconds"])
                for r in held["records"]
            }
            for run in runs.values():
                if not 0 < len(run.train_losses) == len(run.test_errors):
                    raise ValueError("a run needs as many losses as errors")
                if not all(0 <= error <= 100 for error in run.test_errors):
                    raise ValueError("errors are in %")
                if not all(isinstance(x, int | float) for x in (run.seconds, *run.train_losses)):
                    raise ValueError("losses and seconds are numbers")
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
        return runs

    def _write(self) -> None:
        records = [
            {"row": row, "seed": seed, "test_error": run.test_error, **vars(run)}
            for (row, seed), run in self.runs.items()
        ]
        data = {"settings": self.settings, "torch": torch.__version__, "records": records}
        write_text(self.path, json.dumps(data, indent=1))


def norm_name_of(row: str) -> str:
    """Return the config string of a row: ``GN_PRACTICAL`` for ``practical``, ``GN_32`` for ``32``.

    Raises:
        ValueError: The row is no number and no rule.
    """
    name = f"GN_{row.upper()}"
    if group_norm_from_name(name, 1) is None:
        known = ", ".join(n.removeprefix("GN_").lower() for n in norm_names())
        raise ValueError(f"--groups takes {known}; got {row!r}")
    return name


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a tool's options, and return those on which the result of a run depends.

    Raises:
        ValueError: A number is out of range, or ``groups`` has an unknown row.
    """
    for name, value in options.items():
        least = "at least" if name in ("momentum", "weight_decay", "workers") else "above"
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (value > 0 or value == 0 and least == "at least"):
            raise ValueError(f"--{name.replace('_', '-')} must be {least} 0, got {value}")
    for row in options["groups"]:
        norm_name_of(row)
    without = {"groups", "seeds", "data", "output", "device", "workers", "search", "storage"}
    return {name: value for name, value in options.items() if name not in without}


def format_results(
    runs: Mapping[str, Sequence[History]], labels: Mapping[str, str], paper: Mapping[str, float]
) -> str:
    """Format a table of the rows, with the mean of what their runs left.

    Args:
        runs: The runs of each row.
        labels: What to call each row.
        paper: The paper's error, for the rows where it has one.
    """
    table = [
        [
            labels[row],
            len(held),
            mean_and_spread([r.test_error for r in held]),
            f"{paper[row]:.3f}" if row in paper else "-",
            f"{fmean(r.train_losses[-1] for r in held):.5f}",
            f"{fmean(r.seconds for r in held):.0f}",
        ]
        for row, held in runs.items()
    ]
    headers = ["row", "runs", "test error %", "paper", "final train loss", "s/run"]
    align = ("left", "right", "left", "right", "right", "right")
    return tabulate(table, headers, disable_numparse=True, colalign=align)
