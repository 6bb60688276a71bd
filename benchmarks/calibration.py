#!/usr/bin/env python
"""Isometry of a plain 20-layer conv net before and after calibration, and what that costs.

    python benchmarks/calibration.py

Random images and labels; calibrated on two batches, measured on two others. For Detectron2's
models there is tools/measure_gradients.py.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import calibrate, measure_gradient_variance
from gnpractical.layers import group_norm_from_name
from gnpractical.measure.gradient_isometry import mean_abs_log

WIDTHS = [3, *[96, 96, 64, 96] * 5]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def build(norm):
    torch.manual_seed(0)
    layers = []
    for in_channels, out_channels in zip(WIDTHS, WIDTHS[1:], strict=False):
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, group_norm_from_name(norm, out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def main():
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    model = build("GN_MEASURED")
    start = time.perf_counter()
    chosen = calibrate(model, batches[:2], lambda model, batch: model(batch[0]))
    seconds = time.perf_counter() - start
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    step = (time.perf_counter() - start) / len(batches)
    print(f"calibration: {seconds:.2f} s, {seconds / step:.1f} training steps of {step:.3f} s")
    reachable = {row.name for row in chosen if row.isometric_between}
    print(
        f"mean |log K| over all {len(chosen)} layers, over the {len(reachable)} where K = 1 "
        f"lies within reach"
    )
    for norm in ("GN_32", "GN_1", "GN_PRACTICAL", "GN_EXACT", "GN_MEASURED"):
        built = model if norm == "GN_MEASURED" else build(norm)
        rows = measure_gradient_variance(built, batches[2:], loss)
        within = [row for row in rows if row.name in reachable]
        print(f"{norm:13} {mean_abs_log(rows):.3f}  {mean_abs_log(within):.3f}")


if __name__ == "__main__":
    main()
