#!/usr/bin/env python
"""What the law says of a ResNet-50 from forward passes, beside measurements, and what that costs.

    python benchmarks/law.py [--images FOLDER]

At its random start, with cross-entropy to random labels, on 8 images of 224 pixels from anywhere in
a folder, or else of noise. The row `measured` is calibrated on 8 others first.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from torchvision import transforms as T
from torchvision.models import resnet50

from gnpractical import calibrate, convert, feature_statistics, measure_gradient_variance
from gnpractical.measure.block_records import block_records
from gnpractical.measure.gradient_isometry import agreement

RULES = ("upto_32", "upto_1", "cpg_16", "cpg_2", "practical", "exact", "measured")


def load_images(folder, count):
    if folder is None:
        return torch.randn(count, 3, 224, 224)
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png"))[:count]
    normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = T.Compose([T.Resize(224), T.CenterCrop(224), T.ToTensor(), normalize])
    return torch.stack([crop(Image.open(path).convert("RGB")) for path in paths])


def seconds_of(function):
    """Return the shortest of three times, after one that warms up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    images, others = load_images(parser.parse_args().images, 16).split(8)
    labels = torch.arange(8)
    table = []
    for rule in RULES:
        torch.manual_seed(0)
        model = resnet50()
        convert(model, rule=rule)
        if rule == "measured":
            calibrate(model, [others])
        gradients = measure_gradient_variance(
            model, [images], lambda model, x: F.cross_entropy(model(x), labels)
        )
        records = block_records(gradients, feature_statistics(model, [images]))
        law, paper = (
            agreement((r[column], r["K measured"]) for r in records)
            for column in ("K(G)", "K(G) by the paper")
        )
        logs = fmean(abs(math.log(r["K measured"])) for r in records)
        last = records[-1]
        table.append([rule, logs, *law, *paper, last["distinct"], last["similarity"]])
    headers = "rule, mean |log K|, law: correlation, median error, paper: correlation, median error"
    headers += ", distinct at the end, similarity"
    print(tabulate(table, headers.split(", "), floatfmt=".3f"))
    with torch.no_grad():
        forward = seconds_of(lambda: model(images))
    looking = seconds_of(lambda: feature_statistics(model, [images]))
    choosing = seconds_of(lambda: calibrate(model, [images]))
    print(f"feature_statistics: {looking / forward:.2f} forward passes of {forward:.2f} s")
    print(f"calibrate: {choosing / forward:.2f}")


if __name__ == "__main__":
    main()
