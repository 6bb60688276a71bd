#!/usr/bin/env python
"""Check the paper's numbers (arXiv 2302.03193) by computing them again.

python tools/validate_theory.py gains [--csv FILE]
python tools/validate_theory.py gradients [--trials N] [--seed S] [--csv FILE] [--plot FILE]

gains: Table 2, the activation gains: the integral and the paper's value.
gradients: Table 1, Eqs. A to D by autograd on random blocks, beside the paper's law and the exact
one, for the paper's four settings and for 4 to 512 channels per group.
"""

import argparse
import contextlib
import csv
import dataclasses
import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from gnpractical.measure.plots import isometry_curve
from gnpractical.paper.gain_table import format_gains, gain_table
from gnpractical.paper.simulation import PAPER_ROWS, SWEEP_ROWS, simulate


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("gains", help="Table 2: the gains of eleven activations")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table here too")
    command.set_defaults(run=gains)

    command = commands.add_parser("gradients", help="Table 1: the gradient's variance in a block")
    command.add_argument(
        "--trials",
        type=int,
        default=100_000,
        metavar="N",
        help="for each setting; default: 10^5 as in the paper, some minutes",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table here too")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw B over channels per group")
    command.set_defaults(run=gradients)

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


def table_of(rows):
    records = [{"n_g": r.channels_per_group} | dataclasses.asdict(r) for r in rows]
    return tabulate(records, headers="keys", floatfmt=".4f")


def write_csv(file, records):
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    writer.writerows(records)


def main():
    args = parse_args()
    try:
        args.run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
