#!/usr/bin/env python
"""What the runs in rows.csv say: which rows win, whether a search finds them, what predicts them.

    python benchmarks/rows.py [--data-path DIR] [--images DIR]

rows.csv holds scores (PQ where there is one, else box AP) at 1/8, 1/4, 1/2 and all of the
iterations of trainings with tools/train_torchvision.py, --quick, 400 iterations, warmup of 50:

    shapes       Panoptic FPN on the embedded shapes
    shapes_ws    the same with --weight-standardization
    bccd         --model fasterrcnn_resnet_fpn --dataset bccd --min-size 240
    bccd_ws      the same with --weight-standardization
    bccd_ws_100  as bccd_ws, with 100 iterations in all

and accuracies in % by epoch of tools/train_classifier.py --image-size 32 --batch-size 64 on 15,000
images of CIFAR-10, and of tools/train_mlp.py:

    cifar11      --arch bottleneck11 --epochs 6
    cifar47      --arch bottleneck47 --epochs 5
    mnist        --epochs 5

Every row has the best of its learning rates on seed 0. The predictors need the images.
"""

import argparse
import csv
import math
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import kendalltau, ttest_ind
from tabulate import tabulate
from torch.utils.data import DataLoader

from gnpractical import calibrate, feature_statistics
from gnpractical.gradient_law import distinctness_gain
from gnpractical.layers import group_norm_from_name
from gnpractical.paper.comparison import mean_and_spread, significant_differences
from gnpractical.paper.search import cost_of, is_finished, next_rung
from gnpractical.tv.classification import build_classifier, open_classes
from gnpractical.tv.datasets import collate, open_split
from gnpractical.tv.options import parse_args as options_of
from gnpractical.tv.run import build

OPTIONS = {
    "shapes": ["--quick"],
    "bccd": "--quick --model fasterrcnn_resnet_fpn --dataset bccd --min-size 240".split(),
}
OPTIONS["bccd_ws"] = [*OPTIONS["bccd"], "--weight-standardization"]
OPTIONS["bccd_ws_100"] = OPTIONS["bccd_ws"]
OPTIONS["shapes_ws"] = [*OPTIONS["shapes"], "--weight-standardization"]
ARCHS = {"cifar11": "bottleneck11", "cifar47": "bottleneck47"}
CANDIDATE, USUAL = "cpg_4", ("upto_32", "32")


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


def against_usual(values):
    """Say by how much the candidate is above 32 groups, and Welch's test of this one difference."""
    usual = next(row for row in USUAL if row in values)
    test = ttest_ind(values[CANDIDATE], values[usual], equal_var=False)
    difference = fmean(values[CANDIDATE]) - fmean(values[usual])
    return f"{CANDIDATE} over {usual} by {difference:.1f} (Welch's p {test.pvalue:.3f})"


def detector(setting, row, data_path):
    """Return a row's model at its start, batches, how it runs, and where its backbone is."""
    norm = f"GN_{row.upper()}"
    options = options_of([*OPTIONS[setting], "--norm", norm, "--output-dir", "", *data_path])
    panoptic = options.model == "panoptic_fpn_resnet"
    split = open_split(options.data_path, options.dataset, "train", panoptic=panoptic, check=False)
    torch.manual_seed(0)
    model = build(options, len(split.things), len(split.stuff or ()))
    batches = [collate([split[2 * i], split[2 * i + 1]]) for i in range(8)]
    return model, batches, lambda model, batch: model(*batch), "backbone.body"


def classifier(setting, row, images):
    """Return the same of a classifier."""
    train_set, _, num_classes = open_classes(images, "", 32)
    torch.manual_seed(0)
    norm_layer = partial(group_norm_from_name, f"GN_{row.upper()}")
    model = build_classifier(ARCHS[setting], norm_layer, num_classes)
    batches = list(islice(DataLoader(train_set, 64, shuffle=True), 4))
    return model, batches, lambda model, batch: model(batch[0]), ""


def predictors(row, model, batches, run, backbone):
    """Return quantities of the row's model at its start, of the backbone's blocks."""
    if row == "measured":
        calibrate(model, batches[:2], run)
    blocks = feature_statistics(model, batches, run)
    body = [block for block in blocks if block.name.startswith(backbone)]
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
    parser.add_argument("--images", metavar="DIR", help="CIFAR-10's, as train/<class>/")
    args = parser.parse_args()
    data_path = ["--data-path", args.data_path] if args.data_path else []
    for setting, rows in read_rows(args.rows).items():
        values = {row: finals(seeds) for row, seeds in rows.items()}
        order = sorted(rows, key=lambda row: -fmean(values[row]))
        print(f"\n{setting}")
        print(tabulate([[r, len(values[r]), mean_and_spread(values[r], 1)] for r in order]))
        print(f"Differences beyond the noise (Tukey, 5%): {significant_differences(values)}")
        if len(values[CANDIDATE]) > 1:
            print(against_usual(values))
        for seed in range(3):
            if found := replay(rows, seed):
                best, cost, count = found
                print(f"search on seed {seed}: {best}, {cost:.2f} trainings for {count} rows")
        if setting in ARCHS and args.images:
            starts = {row: classifier(setting, row, args.images) for row in rows}
        elif setting in OPTIONS and (data_path or setting.startswith("shapes")):
            starts = {row: detector(setting, row, data_path) for row in rows}
        else:
            continue
        seen = {row: predictors(row, *start) for row, start in starts.items()}
        print(tabulate([[row, *seen[row].values()] for row in order], [setting, *seen[order[0]]]))
        for name in seen[order[0]]:
            tau = kendalltau([seen[r][name] for r in order], [fmean(values[r]) for r in order])
            print(
                f"Kendall's tau of {name} and the score: {tau.statistic:.2f} (p {tau.pvalue:.3f})"
            )


if __name__ == "__main__":
    main()
