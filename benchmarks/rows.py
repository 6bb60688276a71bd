#!/usr/bin/env python
"""What the runs in rows.csv say: which rows win, whether a search finds them, what predicts them.

    python benchmarks/rows.py [--data-path DIR]

rows.csv holds scores at 1/8, 1/4, 1/2 and all of the iterations (PQ where there is one, else box
AP) of trainings with tools/train_torchvision.py, --quick, 400 iterations, warmup of 50:

    shapes    Panoptic FPN on the embedded shapes
    bccd      --model fasterrcnn_resnet_fpn --dataset bccd --min-size 240
    bccd_ws   the same with --weight-standardization
    bccd_ws_100  as bccd_ws, with 100 iterations in all

Every row has the better of its learning rates on seed 0. The predictors need the images.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import kendalltau
from tabulate import tabulate

from gnpractical import calibrate, feature_statistics
from gnpractical.gradient_law import distinctness_gain
from gnpractical.paper.comparison import mean_and_spread, significant_differences
from gnpractical.paper.search import cost_of, is_finished, next_rung
from gnpractical.tv.datasets import collate, open_split
from gnpractical.tv.options import parse_args as options_of
from gnpractical.tv.run import build

OPTIONS = {
    "shapes": ["--quick"],
    "bccd": "--quick --model fasterrcnn_resnet_fpn --dataset bccd --min-size 240".split(),
}
OPTIONS["bccd_ws"] = [*OPTIONS["bccd"], "--weight-standardization"]
OPTIONS["bccd_ws_100"] = OPTIONS["bccd_ws"]


def read_rows(path):
    """Return {setting: {row: {seed: {iteration: score}}}}, of each row's better learning rate."""
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(dict))))
    for r in csv.DictReader(path.open()):
        at = runs[r["setting"]][r["row"]][r["lr"]][int(r["seed"])]
        at[int(r["iteration"])] = float(r["score"])
    return {
        setting: {
            row: max(rates.values(), key=lambda seeds: seeds[0][max(seeds[0])])
            for row, rates in rows.items()
        }
        for setting, rows in runs.items()
    }


def finals(seeds):
    return [scores[max(scores)] for _, scores in sorted(seeds.items())]


def replay(rows, seed):
    """Return the row at which a search over the recorded scores of one seed ends, and its cost."""
    held = {row: seeds[seed] for row, seeds in rows.items() if len(seeds.get(seed, ())) > 1}
    if len(held) < 4:
        return None
    stops = sorted(set.intersection(*(set(scores) for scores in held.values())))
    scores = {}
    while not is_finished(scores, list(held), stops):
        stop, race = next_rung(scores, list(held), stops)
        scores |= {(row, stop): [held[row][stop]] for row in race}
    return next_rung(scores, list(held), stops)[1][0], cost_of(scores, stops), len(held)


def predictors(setting, row, data_path):
    """Return quantities of the row's model at its start, of the backbone's blocks."""
    norm = f"GN_{row.upper()}"
    options = options_of([*OPTIONS[setting], "--norm", norm, "--output-dir", "", *data_path])
    panoptic = options.model == "panoptic_fpn_resnet"
    split = open_split(options.data_path, options.dataset, "train", panoptic=panoptic, check=False)
    torch.manual_seed(0)
    model = build(options, len(split.things), len(split.stuff or ()))
    batches = [collate([split[2 * i], split[2 * i + 1]]) for i in range(8)]

    def run(model, batch):
        return model(*batch)

    if row == "measured":
        calibrate(model, batches[:2], run)
    blocks = feature_statistics(model, batches, run)
    body = [block for block in blocks if block.name.startswith("backbone.body")]
    gains = [distinctness_gain(b.out_channels // b.num_groups, b.mean_share) for b in body]
    ratios = [block.gradient_variance_ratio() for block in blocks]
    return {
        "sum of log A": sum(map(math.log, gains)),
        "distinct at the end": 1 - body[-1].mean_share_behind,
        "similarity at the end": body[-1].similarity,
        "mean |log K|": fmean(abs(math.log(k)) for k in ratios if k),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("rows.csv"))
    parser.add_argument("--data-path", metavar="DIR", help="as of train_torchvision.py")
    args = parser.parse_args()
    data_path = ["--data-path", args.data_path] if args.data_path else []
    for setting, rows in read_rows(args.rows).items():
        values = {row: finals(seeds) for row, seeds in rows.items()}
        order = sorted(rows, key=lambda row: -fmean(values[row]))
        print(f"\n{setting}")
        print(tabulate([[r, len(values[r]), mean_and_spread(values[r], 1)] for r in order]))
        print(f"Differences beyond the noise (Tukey, 5%): {significant_differences(values)}")
        for seed in range(3):
            if found := replay(rows, seed):
                best, cost, count = found
                print(f"search on seed {seed}: {best}, {cost:.2f} trainings for {count} rows")
        if not data_path and setting != "shapes":
            continue
        seen = {row: predictors(setting, row, data_path) for row in rows}
        print(tabulate([[row, *seen[row].values()] for row in order], [setting, *seen[order[0]]]))
        for name in seen[order[0]]:
            tau = kendalltau([seen[r][name] for r in order], [fmean(values[r]) for r in order])
            print(
                f"Kendall's tau of {name} and the score: {tau.statistic:.2f} (p {tau.pvalue:.3f})"
            )


if __name__ == "__main__":
    main()
