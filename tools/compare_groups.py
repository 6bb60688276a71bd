#!/usr/bin/env python
"""Train a config with several group counts and seeds and compare them, as the paper's Tables 5, 6.

    python tools/compare_groups.py --config-file configs/quick/pfpn_gnp_shapes.yaml \\
        --groups 32 1 practical exact measured --seeds 3 --output output/compare [KEY VALUE ...]

Every norm of the config that is a GroupNorm gets the row's groups. Each run is a training of its
own (tools/train_net.py); one that was interrupted is resumed, one that has finished is not
repeated. Writes table.txt, results.json and the learning curves to the output folder.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from statistics import fmean

from detectron2.modeling import build_model
from tabulate import tabulate
from tqdm import tqdm

from gnpractical import group_report
from gnpractical.d2 import load_config
from gnpractical.d2.norm import group_norm_keys
from gnpractical.measure.plots import learning_curves
from gnpractical.paper.comparison import mean_and_spread, significant_differences
from gnpractical.paper.results import norm_name_of
from gnpractical.paper.training_run import SCORES, train_once

ROWS = ["32", "1", "practical"]
JUDGED = ("panoptic_seg/PQ", "bbox/AP")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--groups", nargs="+", default=ROWS, metavar="ROW", help="numbers, rules")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    return parser.parse_args()


def row_options(args, row):
    keys = group_norm_keys(load_config(args.config_file, args.opts))
    return [*args.opts, *(word for key in keys for word in (key, norm_name_of(row)))]


def check_row(args, row):
    """Find errors before any training, by building a model with the row."""
    cfg = load_config(args.config_file, row_options(args, row))
    cfg.MODEL.DEVICE = "cpu"
    try:
        rows = group_report(build_model(cfg))
    except ValueError as e:
        raise ValueError(f"row {row}: {e}") from None
    if not any(r.norm == norm_name_of(row) for r in rows):
        raise ValueError(f"{args.config_file}: its model has no GroupNorm that rows could set")


def train_row(args, row, seed):
    """Return the result of one training, started unless it has finished."""
    folder = args.output / row / f"seed{seed}"
    options = [*row_options(args, row), "SEED", str(seed), "OUTPUT_DIR"]
    # Without the folder in it, which may be given another name.
    settings = load_config(args.config_file, [*options, ""]).dump()
    tool = str(Path(__file__).with_name("train_net.py"))
    flags = ["--resume", "--num-gpus", str(args.num_gpus), "--config-file", args.config_file]
    command = [tool, *flags, *options, str(folder)]
    return train_once(command, folder, settings)


def report(runs):
    scores = {row: [r["scores"] for r in results] for row, results in runs.items()}
    values = {
        name: {row: [s[name] for s in held if name in s] for row, held in scores.items()}
        for name in SCORES
    }
    present = [name for name in SCORES if any(values[name].values())]
    table = [
        [row, len(results)]
        + [mean_and_spread(values[name][row]) for name in present]
        + [
            mean_and_spread([r["seconds_per_step"] for r in results], 3),
            f"{fmean(r['peak_memory_mib'] for r in results):.0f}",
        ]
        for row, results in runs.items()
    ]
    names = [s.split("/")[1] if s.startswith("pan") else s.replace("/", " ") for s in present]
    text = tabulate(table, ["G", "runs", *names, "s/step", "peak MiB"], disable_numparse=True)
    for name in (name for name in JUDGED if name in present):
        found = significant_differences(values[name])
        text += f"\n{name}: differences beyond the noise (Tukey's range test, 5%): {found}"
    return text


def average_curve(results):
    at = {}
    for result in results:
        for iteration, loss in result["losses"]:
            at.setdefault(iteration, []).append(loss)
    return {i: fmean(losses) for i, losses in sorted(at.items())}


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run does not outlive this
    try:
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        runs = {row: [] for row in args.groups}
        for row in runs:
            check_row(args, row)
        todo = [(row, seed) for seed in range(1, args.seeds + 1) for row in runs]
        with tqdm(todo, unit="run") as bar:
            for row, seed in bar:
                bar.set_description(f"G {row}, seed {seed}")
                runs[row].append(train_row(args, row, seed))
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    text = report(runs)
    (args.output / "table.txt").write_text(text + "\n")
    (args.output / "results.json").write_text(json.dumps(runs, indent=1))
    curves = {f"G {row}": average_curve(results) for row, results in runs.items()}
    picture = args.output / "learning_curves.png"
    learning_curves(curves, picture, "total loss, mean over seeds", xlabel="iteration")
    print(f"{text}\nWritten to {args.output}: table.txt, results.json, learning_curves.png")


if __name__ == "__main__":
    main()
