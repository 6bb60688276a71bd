#!/usr/bin/env python
"""Train with several group counts and seeds and compare them, as the paper's Tables 5 and 6.

    python tools/compare_groups.py --config-file configs/quick/pfpn_gnp_shapes.yaml \\
        --groups 32 1 practical exact measured --seeds 3 --output output/compare [KEY VALUE ...]
    python tools/compare_groups.py --search --output output/search --torchvision --quick ...

With a config every norm of it that is a GroupNorm gets the row's groups, and runs are trainings of
tools/train_net.py; after --torchvision come the options of tools/train_torchvision.py, which then
trains. A run that was interrupted is resumed, one that has finished is not repeated. With --search
all rows start and the worse half stops at 1/8, 1/4 and 1/2 of the iterations, so that 8 rows cost
2.5 trainings instead of 8; several machines may work on one --output or --storage.
"""

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from gnpractical.measure.plots import learning_curves
from gnpractical.paper.comparison import format_runs
from gnpractical.paper.results import norm_name_of
from gnpractical.paper.training_run import JUDGED, Diverged, train_once
from gnpractical.runs.errors import in_one_line

ROWS = ["32", "1", "practical"]
SEARCHED = ["cpg_1", "cpg_2", "cpg_4", "cpg_8", "cpg_16", "1", "upto_32", "practical"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="of Detectron2")
    rows = f"numbers, rules ({' '.join(ROWS)}; to search: {' '.join(SEARCHED)})"
    parser.add_argument("--groups", nargs="+", metavar="ROW", help=rows)
    parser.add_argument("--seeds", type=int, metavar="N", help="3; to search 1")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    parser.add_argument("--search", action="store_true", help="find the best row")
    storage = "of the search, for Optuna (a file in --output)"
    parser.add_argument("--storage", metavar="URL", help=storage)
    options = "options of train_torchvision.py"
    parser.add_argument("--torchvision", nargs=argparse.REMAINDER, metavar="...", help=options)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    return parser.parse_args()


def rows_of(args):
    """Return the trainings that the options ask for."""
    if (args.config_file is None) == (args.torchvision is None):
        raise ValueError("give either --config-file FILE, or --torchvision and its options")
    if args.torchvision is not None:
        from gnpractical.tv.comparison import TorchvisionRows

        return TorchvisionRows(args.torchvision)
    from gnpractical.d2.comparison import Detectron2Rows

    return Detectron2Rows(args.config_file, args.opts, args.num_gpus)


def check_row(rows, row):
    norm = norm_name_of(row)
    try:
        rows.check(norm)
    except ValueError as e:
        raise ValueError(f"row {row}: {e}") from None


def train_row(args, rows, row, seed, stop_at=0):
    """Return the result of one training, started unless it has finished."""
    folder = args.output / row / f"seed{seed}"
    tool, *options = rows.command(norm_name_of(row), seed, folder, stop_at)
    command = [str(Path(__file__).with_name(tool)), *options]
    return train_once(command, folder, rows.settings(norm_name_of(row), seed), stop_at)


def average_curve(results):
    at = {}
    for result in results:
        for iteration, loss in result["losses"]:
            at.setdefault(iteration, []).append(loss)
    return {i: fmean(losses) for i, losses in sorted(at.items())}


def compare(args, rows):
    runs = {row: [] for row in args.groups}
    todo = [(row, seed) for seed in range(1, args.seeds + 1) for row in runs]
    with tqdm(todo, unit="run") as bar:
        for row, seed in bar:
            bar.set_description(f"G {row}, seed {seed}")
            runs[row].append(train_row(args, rows, row, seed))
    text = format_runs(runs)
    (args.output / "table.txt").write_text(text + "\n")
    (args.output / "results.json").write_text(json.dumps(runs, indent=1))
    curves = {f"G {row}": average_curve(results) for row, results in runs.items()}
    picture = args.output / "learning_curves.png"
    learning_curves(curves, picture, "total loss, mean over seeds", xlabel="iteration")
    print(f"{text}\nWritten to {args.output}: table.txt, results.json, learning_curves.png")


def search(args, rows):
    from gnpractical.paper.search import find_best

    def train(row, stop):
        at = 0 if stop == rows.iterations else stop
        try:
            results = [train_row(args, rows, row, seed + 1, at) for seed in range(args.seeds)]
        except Diverged:
            return [math.nan] * args.seeds
        name = next((n for n in JUDGED if n in results[0]["scores"]), None)
        if name is None:
            raise ValueError("the runs have no score to compare: they must be evaluated")
        return [result["scores"].get(name, math.nan) for result in results]

    settings = {"seeds": args.seeds, "settings": rows.settings(norm_name_of(args.groups[0]), 0)}
    plan = args.groups, rows.iterations, train, args.output, args.storage, settings
    print(find_best(*plan, score="PQ, or box AP where there is none"))


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run does not outlive this
    args.groups = args.groups or (SEARCHED if args.search else ROWS)
    args.seeds = (1 if args.search else 3) if args.seeds is None else args.seeds
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    rows = rows_of(args)
    for row in args.groups:
        check_row(rows, row)
    if args.search:
        search(args, rows)
    else:
        compare(args, rows)


if __name__ == "__main__":
    with in_one_line():
        main()
