#!/usr/bin/env python
"""What it costs to build R-101-FPN in Detectron2 with GN_PRACTICAL in place of GN.

    python benchmarks/building.py [--repeats 7]

Also the part of it that goes into resolving group counts, a group report, and a conversion to
another rule. Medians, and the quartiles of the ratios to GN.
"""

import argparse
import statistics
import time

import detectron2
import torch
from detectron2.modeling import build_backbone

from gnpractical import convert, group_report
from gnpractical.d2 import load_config
from gnpractical.layers import pairing


def config(norm):
    options = ["MODEL.RESNETS.DEPTH", "101", "MODEL.DEVICE", "cpu"]
    options += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    for section in ("RESNETS", "FPN"):
        options += [f"MODEL.{section}.NORM", norm]
    return load_config("configs/pfpn_gnp_full.yaml", options)


def build_times(repeats):
    times = {"GN": [], "GN_PRACTICAL": [], "resolving": [], "report": [], "convert": []}
    resolve = pairing._feeding_layer

    def timed(*args):
        start = time.perf_counter()
        try:
            return resolve(*args)
        finally:
            spent[0] += time.perf_counter() - start

    pairing._feeding_layer = timed
    for i in range(repeats + 1):
        for norm in ("GN", "GN_PRACTICAL"):
            spent = [0.0]
            cfg = config(norm)
            start = time.perf_counter()
            backbone = build_backbone(cfg)
            if i:
                times[norm].append(time.perf_counter() - start)
        start = time.perf_counter()
        group_report(backbone)
        reported = time.perf_counter()
        convert(backbone, rule="closest")
        if i:
            times["resolving"].append(spent[0])
            times["report"].append(reported - start)
            times["convert"].append(time.perf_counter() - reported)
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, detectron2 {detectron2.__version__}")
    times = build_times(args.repeats)
    for name, values in times.items():
        ratios = [b / a for a, b in zip(times["GN"], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: median {statistics.median(values):.4f} s of {len(values)}, over GN "
            f"{middle:.3f} ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
