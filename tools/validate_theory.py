#!/usr/bin/env python
"""Check the paper's numbers (arXiv 2302.03193) by computing them again.

python tools/validate_theory.py gains [--csv FILE]
python tools/validate_theory.py gradients [--trials N] [--seed S] [--csv FILE] [--plot FILE]
python tools/validate_theory.py convolutions [--trials N] [--seed S] [--csv FILE] [--plot FILE]

gains: Table 2, the activation gains: the integral and the paper's value.
gradients: Table 1, Eqs. A to D by autograd on random blocks, beside the paper's law and the exact
one, for the paper's four settings and for 4 to 512 channels per group.
convolutions: K by autograd, beside the exact law from forward passes and the paper's.
"""

import argparse
import contextlib
import csv
import dataclasses
import math
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from gnpractical.measure.plots import isometry_curve, predicted_and_measured
from gnpractical.paper.convolutions import SETTINGS, simulate_convolutions
from gnpractical.paper.gain_table import format_gains, gain_table
from gnpractical.paper.simulation import PAPER_ROWS, SWEEP_ROWS, simulate
from gnpractical.runs.errors import in_one_line


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("gains", help="Table 2: the gains of eleven activations")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table here too")
    command.set_defaults(run=gains)

    sampled = (
        (gradients, 100_000, "Table 1: the gradient's variance in a block", "10^5 as in the paper"),
        (convolutions, 16, "the laws on convolutions", "16, half a minute"),
    )
    for run, trials, text, default in sampled:
        command = commands.add_parser(run.__name__, help=text)
        help_text = f"for each setting; default: {default}"
        command.add_argument("--trials", type=int, default=trials, metavar="N", help=help_text)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--csv", type=Path, metavar="FILE", help="write the table here too")
        command.add_argument("--plot", type=Path, metavar="FILE", help="draw the laws")
        command.set_defaults(run=run)

    return parser.parse_args()


def gains(args):
    rows = gain_table()
    if args.csv:
        with args.csv.open("w", newline="") as file:
            write_csv(file, [dataclasses.asdict(r) | {"near_paper": r.near_paper} for r in rows])
    print(format_gains(rows))


def gradients(args):
    with contextlib.ExitStack() as stack:
        # Opened first: a bad path is not found out only after the sampling.
        file = stack.enter_context(args.csv.open("w", newline="")) if args.csv else None
        if args.plot:
            args.plot.touch()
        rows = dict.fromkeys((*PAPER_ROWS, *SWEEP_ROWS))  # which have one setting in common
        for setting in tqdm(rows, unit="setting", disable=None):
            rows[setting] = simulate(*setting, args.trials, args.seed)
        if file:
            write_csv(file, [dataclasses.asdict(r) for setting in rows.values() for r in setting])
    print("The paper's settings; at 4 channels per group its law and the exact one agree.")
    print(table_of(r for setting in PAPER_ROWS for r in rows[setting]))
    print("\nOther channels per group")
    sweep = [r for setting in SWEEP_ROWS for r in rows[setting] if r.equation in ("B", "D")]
    print(table_of(sweep))
    if args.plot:
        isometry_curve(sweep, args.plot)


def convolutions(args):
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(args.csv.open("w", newline="")) if args.csv else None
        if args.plot:
            args.plot.touch()
        rows = []
        for setting in tqdm(SETTINGS, unit="setting", disable=None):
            rows += simulate_convolutions(setting, args.trials, args.seed)
        records = []
        for row in rows:
            record = dataclasses.asdict(row)
            records.append(record.pop("setting") | record)
        if file:
            write_csv(file, records)
    print(tabulate(records, headers="keys", floatfmt=".3f"))
    laws = {law: [(getattr(r, law), r.measured) for r in rows] for law in ("law", "paper")}
    worst = max(rows, key=lambda r: abs(math.log(r.law / r.measured)))
    print(f"Largest error of the law: {abs(worst.law / worst.measured - 1):.1%}")
    if args.plot:
        predicted_and_measured(laws, args.plot, title="Convolutions")


def table_of(rows):
    records = [{"n_g": r.channels_per_group} | dataclasses.asdict(r) for r in rows]
    return tabulate(records, headers="keys", floatfmt=".4f")


def write_csv(file, records):
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    writer.writerows(records)


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    with in_one_line():
        main()
