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
import statistics
import sys
from pathlib import Path

from detectron2.modeling import build_model
from tabulate import tabulate
from tqdm import tqdm

from gnpractical import group_report
from gnpractical.analysis.comparison import mean_and_spread, significant_differences
from gnpractical.analysis.experiments import check_rows, norm_name_of
from gnpractical.analysis.plots import learning_curves
from gnpractical.d2 import load_config
from gnpractical.d2.norm import group_norm_keys
from gnpractical.d2.runs import SCORES, train_once

JUDGED = ("panoptic_seg/PQ", "bbox/AP")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--groups", nargs="+", default=["32", "1", "practical"], metavar="ROW",
                        help="numbers that divide all widths, or rules")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    return parser.parse_args()


def run_options(args, row, seed):
    keys = group_norm_keys(load_config(args.config_file, args.opts))
    norms = [word for key in keys for word in (key, norm_name_of(row))]
    folder = args.output / row / f"seed{seed}"
    return [*args.opts, *norms, "SEED", str(seed), "OUTPUT_DIR", str(folder)]


def check_row(args, row):
    """Errors before any training: a model that can be built with the row."""
    cfg = load_config(args.config_file, run_options(args, row, 1))
    cfg.MODEL.DEVICE = "cpu"
    try:
        rows = group_report(build_model(cfg))
    except ValueError as e:
        raise ValueError(f"row {row}: {e}") from None
    if not any(r.norm == norm_name_of(row) for r in rows):
        raise ValueError(f"{args.config_file}: its model has no GroupNorm that rows could set")


def report(runs):
    present = [s for s in SCORES if any(s in r["scores"] for rs in runs.values() for r in rs)]
    table = [
        [row, len(results)]
        + [mean_and_spread([r["scores"][s] for r in results if s in r["scores"]]) for s in present]
        + [mean_and_spread([r["seconds_per_step"] for r in results], 3),
           f"{statistics.fmean(r['peak_memory_mib'] for r in results):.0f}"]
        for row, results in runs.items()
    ]  # fmt: skip
    names = [s.split("/")[1] if s.startswith("pan") else s.replace("/", " ") for s in present]
    text = tabulate(table, ["G", "runs", *names, "s/step", "peak MiB"], disable_numparse=True)
    for score in (s for s in JUDGED if s in present):
        samples = {
            row: [r["scores"][score] for r in results if score in r["scores"]]
            for row, results in runs.items()
        }
        found = significant_differences(samples)
        text += f"\n{score}: differences beyond the noise (Tukey's range test, 5%): "
        text += "; ".join(f"{d.higher} over {d.lower} by {d.difference:.2f} (p {d.p_value:.3f})"
                          for d in found) or "none"  # fmt: skip
    return text


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run does not outlive this
    try:
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        args.groups = list(dict.fromkeys(args.groups))
        check_rows(args.groups)
        for row in args.groups:
            check_row(args, row)
        todo = [(row, seed) for seed in range(1, args.seeds + 1) for row in args.groups]
        runs = {row: [] for row in args.groups}
        for row, seed in (bar := tqdm(todo, unit="run")):
            bar.set_description(f"G {row}, seed {seed}")
            opts = run_options(args, row, seed)
            command = [str(Path(__file__).with_name("train_net.py")), "--resume", "--num-gpus",
                       str(args.num_gpus), "--config-file", args.config_file, *opts]  # fmt: skip
            runs[row].append(train_once(command, load_config(args.config_file, opts)))
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    text = report(runs)
    (args.output / "table.txt").write_text(text + "\n")
    (args.output / "results.json").write_text(json.dumps(runs, indent=1))
    curves = {f"G {row}": average_curve(results) for row, results in runs.items()}
    picture = args.output / "learning_curves.png"
    learning_curves(curves, picture, "total loss, mean over seeds", xlabel="iteration")
    print(f"{text}\nWritten to {args.output}: table.txt, results.json, learning_curves.png")


def average_curve(results):
    at = {}
    for result in results:
        for iteration, loss in result["losses"]:
            at.setdefault(iteration, []).append(loss)
    return {i: statistics.fmean(losses) for i, losses in sorted(at.items())}


if __name__ == "__main__":
    main()
