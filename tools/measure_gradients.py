#!/usr/bin/env python
"""Measure what the gradient's variance does across every block of a config's model.

    python tools/measure_gradients.py --config-file configs/quick/pfpn_gnp_shapes.yaml \\
        --groups 32 1 practical exact measured --output output/gradients [KEY VALUE ...]

For each row the model is built anew (same seed; with MODEL.WEIGHTS if the config has any), every
GroupNorm gets the row's groups, and K, the gradient's variance at a block's input over that at its
output, is measured on the same training batches and predicted from forward passes over them. The
row `measured` is calibrated on other batches first. Writes gradients.csv, gradients.png and
predicted.png.
"""

import argparse
import csv
import logging
import math
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from gnpractical import (
    calibrate,
    feature_statistics,
    measure_gradient_variance,
)
from gnpractical.d2 import load_config
from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.norm import group_norm_keys
from gnpractical.d2.preflight import check_datasets
from gnpractical.d2.trainer import adapt_to_device
from gnpractical.measure.block_records import block_records
from gnpractical.measure.gradient_isometry import agreement
from gnpractical.measure.plots import block_gradients, predicted_and_measured
from gnpractical.num_groups import check_width
from gnpractical.paper.results import norm_name_of
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.output_dir import claim_output_dir

ROWS = ["32", "1", "practical", "exact", "measured"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--groups", nargs="+", default=ROWS, metavar="ROW", help="numbers, rules")
    parser.add_argument("--batches", type=int, default=2, help="to measure, and to calibrate, on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    return parser.parse_args()


def build(cfg, norm):
    cfg = cfg.clone()
    cfg.merge_from_list([word for key in group_norm_keys(cfg) for word in (key, norm)])
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        GNPCheckpointer(model, mismatch="ignore").load(cfg.MODEL.WEIGHTS)
    return model


def measure(args, cfg, norms):
    """Return gradients and features of every block by row."""
    batches = list(islice(iter(build_detection_train_loader(cfg)), 2 * args.batches))
    fresh, first = batches[: args.batches], batches[args.batches :]
    gradients, features = {}, {}
    for row, norm in norms.items():
        model = build(cfg, norm)
        if row == "measured":
            calibrate(model, first)
        gradients[row] = [b for b in measure_gradient_variance(model, fresh) if b.num_groups]
        if not gradients[row]:
            raise ValueError(f"{args.config_file}: its model has no GroupNorm")
        features[row] = feature_statistics(model, fresh)
    return gradients, features


def report(tables):
    """Print a table a row, and return (predicted, measured) of all blocks by law."""
    pairs, summary = {"law": [], "paper": []}, []
    for row, table in tables.items():
        print(f"\nG = {row}")
        shown = [{k: v for k, v in r.items() if k not in ("activation", "skipped")} for r in table]
        print(tabulate(shown, "keys", floatfmt=".2f", missingval="-"))
        measured = [r for r in table if r["K measured"]]
        found = []
        for law, column in (("law", "K(G)"), ("paper", "K(G) by the paper")):
            points = [(r[column], r["K measured"]) for r in measured if r[column]]
            pairs[law] += points
            found += agreement(points)
        logs = fmean(abs(math.log(r["K measured"])) for r in measured) if measured else math.nan
        summary.append([row, len(measured), logs, *found])
    titles = (
        "G, blocks, mean |log K|, law: correlation, median error, paper: correlation, median error"
    )
    print(f"\n{tabulate(summary, titles.split(', '), floatfmt='.3f')}")
    return pairs


def write_csv(tables, path):
    with open(path, "w", newline="") as f:
        records = [{"row": row} | record for row, table in tables.items() for record in table]
        writer = csv.DictWriter(f, records[0])
        writer.writeheader()
        writer.writerows(records)


def main():
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    cfg = load_config(args.config_file, args.opts)
    adapt_to_device(cfg)
    norms = {row: norm_name_of(row) for row in args.groups}
    check_width("--batches", args.batches)
    claim_output_dir(args.output, "--output")
    check_datasets(cfg, "TRAIN")
    with EventStorage():
        gradients, features = measure(args, cfg, norms)
    tables = {row: block_records(b, features[row]) for row, b in gradients.items()}
    pairs = report(tables)
    write_csv(tables, args.output / "gradients.csv")
    law = {row: {r["layer"]: r["K(G)"] for r in table} for row, table in tables.items()}
    title = args.config_file
    block_gradients(gradients, law, args.output / "gradients.png", title=title)
    predicted_and_measured(pairs, args.output / "predicted.png", title=title)
    print(f"Written to {args.output}: gradients.csv, gradients.png, predicted.png")


if __name__ == "__main__":
    with in_one_line():
        main()
