#!/usr/bin/env python
"""Measure what the gradient's variance does across every block of a config's model.

    python tools/measure_gradients.py --config-file configs/quick/pfpn_gnp_shapes.yaml \\
        --groups 32 1 practical exact measured --output output/gradients [KEY VALUE ...]

For each row the model is built anew (same seed; with MODEL.WEIGHTS if the config has any), every
GroupNorm gets the row's groups, and K, the gradient's variance at a block's input over that at its
output, is measured on the same training batches. The row `measured` is calibrated on other batches
first. Writes gradients.csv and gradients.png.
"""

import argparse
import csv
import logging
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from gnpractical import calibrate, measure_gradient_variance
from gnpractical.d2 import load_config
from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.norm import group_norm_keys
from gnpractical.d2.preflight import check_datasets
from gnpractical.d2.trainer import adapt_to_device
from gnpractical.measure.gradient_isometry import mean_abs_log
from gnpractical.measure.plots import block_gradients
from gnpractical.num_groups import check_width
from gnpractical.paper.results import norm_name_of

ROWS = ["32", "1", "practical", "exact", "measured"]
COLUMNS = (
    "in_channels out_channels num_groups activation ratio skipped_calls skipped_reason".split()
)


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


def step_seconds(model, batches):
    start = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for batch in batches:
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


def measure(args, cfg, norms):
    """Return measurements by row, and the blocks where some count has K on either side of 1."""
    batches = list(islice(iter(build_detection_train_loader(cfg)), 2 * args.batches))
    fresh, first = batches[: args.batches], batches[args.batches :]
    rows, reachable = {}, set()
    for row, norm in norms.items():
        model = build(cfg, norm)
        if row == "measured":
            start = time.perf_counter()
            chosen = calibrate(model, first)
            seconds = time.perf_counter() - start
            reachable = {choice.name for choice in chosen if choice.isometric_between}
            steps = seconds / step_seconds(model, first)
            print(f"Calibrated {len(chosen)} norms in {seconds:.1f} s, {steps:.1f} training steps")
        rows[row] = [b for b in measure_gradient_variance(model, fresh) if b.num_groups]
        if not rows[row]:
            raise ValueError(f"{args.config_file}: its model has no GroupNorm")
    return rows, reachable


def report(rows, reachable):
    layers = next(iter(rows.values()))
    table = [
        [layer.name, layer.in_channels, layer.out_channels]
        + [
            f"{blocks[i].num_groups}: {blocks[i].ratio:.2f}" if blocks[i].ratio else "-"
            for blocks in rows.values()
        ]
        for i, layer in enumerate(layers)
    ]
    titles = [f"G: K at {row}" for row in rows]
    print(tabulate(table, ["layer", "in", "out", *titles], disable_numparse=True))
    summary = [["all", len(layers), *map(mean_abs_log, rows.values())]]
    if reachable:
        within = [[b for b in blocks if b.name in reachable] for blocks in rows.values()]
        means = map(mean_abs_log, within)
        summary.append(["K = 1 reachable", len(reachable), *means])
    print("\nMean |log K| (0: every block keeps the gradient's scale)")
    print(tabulate(summary, ["blocks", "number", *rows], floatfmt=".3f"))


def write_csv(rows, path):
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["row", "layer", *COLUMNS])
        for row, blocks in rows.items():
            for block in blocks:
                writer.writerow([row, block.name, *(getattr(block, name) for name in COLUMNS)])


def main():
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        cfg = load_config(args.config_file, args.opts)
        adapt_to_device(cfg)
        norms = {row: norm_name_of(row) for row in args.groups}
        check_width("--batches", args.batches)
        args.output.mkdir(parents=True, exist_ok=True)
        check_datasets(cfg, cfg.DATASETS.TRAIN)
        with EventStorage():
            rows, reachable = measure(args, cfg, norms)
        report(rows, reachable)
        write_csv(rows, args.output / "gradients.csv")
        block_gradients(rows, args.output / "gradients.png", title=args.config_file)
    except (ValueError, TypeError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"Written to {args.output}: gradients.csv, gradients.png")


if __name__ == "__main__":
    main()
