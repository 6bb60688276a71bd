#!/usr/bin/env python
"""What is left of a BatchNorm classifier when its norms become GroupNorms.

    python tools/train_classifier.py --dataset <folder> --arch bottleneck20 --image-size 32 \
        --groups BN --seeds 3 --epochs 20 --lr 0.05 --workers 1 --output output/bn
    python benchmarks/carry_over.py --dataset <folder> --weights output/bn/weights_BN_*.pth \
        --output output/carry_over.json

For each rule: accuracy with weights and biases of the norms as they were, matched on 32 batches of
16 training images and on one, and matched and then trained with a constant learning rate, the best
of three by the accuracy after 100 steps. Beside it the BatchNorm net trained on, and nets of each
rule from scratch, in the same way. The output is added to after every row, and what it holds is not
run again.
"""

import argparse
import copy
import json
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gnpractical import convert, match_norms
from gnpractical.paper.classifier import error_rate
from gnpractical.runs.output_dir import write_text
from gnpractical.tv.classification import build_classifier, open_classes

RULES = ["practical", "exact", 1, "upto_32", "cpg_16", "practical WS"]
RATES = {"carried over": (0.001, 0.003, 0.01), "from scratch": (0.01, 0.03, 0.1)}
STEPS = (100, 500)


def forward_passes(model, batches):
    """The time that matching takes, in forward passes of the same model over the same batches."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    plain, matching = [], []
    with torch.no_grad():
        for _ in range(7):
            start = time.perf_counter()
            for batch in batches:
                model.eval()(batch)
            middle = time.perf_counter()
            match_norms(model, batches, only=norms.keys())
            plain.append(middle - start)
            matching.append(time.perf_counter() - middle)
    return statistics.median(matching) / statistics.median(plain)


class Experiment:
    def __init__(self, args):
        train, test, self.classes = open_classes(args.dataset, "", args.image_size)
        self.arch, self.image_size = args.arch, args.image_size
        self.train = DataLoader(train, 64, shuffle=True, drop_last=True, num_workers=1)
        self.small = DataLoader(train, 16, shuffle=True)
        # Decoded once.
        self.test = list(DataLoader(test, 250))

    def accuracy(self, model):
        return 100 - error_rate(model, self.test)

    def fit(self, model, rates, seed):
        """Accuracy by steps, at the rate that is best after the first."""
        tried = []
        for rate in rates:
            net = copy.deepcopy(model)
            optimizer = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=5e-4)
            stream = self.batches(seed)
            self.steps(net, optimizer, islice(stream, STEPS[0]))
            tried.append((self.accuracy(net), rate, net, optimizer, stream))
        first, rate, net, optimizer, stream = max(tried, key=lambda entry: entry[0])
        self.steps(net, optimizer, islice(stream, STEPS[1] - STEPS[0]))
        return {"rate": rate, STEPS[0]: first, STEPS[1]: self.accuracy(net)}

    def batches(self, seed):
        torch.manual_seed(seed)
        while True:
            yield from self.train

    def steps(self, net, optimizer, batches):
        net.train()
        for inputs, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()

    def converted(self, model, rule):
        rule, _, standardized = str(rule).partition(" ")
        rule = int(rule) if rule.isdecimal() else rule
        example = torch.randn(1, 3, self.image_size, self.image_size)
        kwargs = {"rule": rule, "weight_standardization": bool(standardized), "inplace": False}
        return convert(model, example, **kwargs).model

    def row(self, weights, rule, seed):
        torch.manual_seed(seed)
        random = build_classifier(self.arch, nn.BatchNorm2d, self.classes)
        trained = copy.deepcopy(random)
        trained.load_state_dict(torch.load(weights, weights_only=True)["model"])
        if rule == "BN":
            row = {"kept": self.accuracy(trained)}
            return row | self.fit(trained, RATES["carried over"], seed)
        carried = self.converted(trained, rule)
        row = {"kept": self.accuracy(carried)}
        torch.manual_seed(seed)
        images = [inputs for inputs, _ in islice(self.small, 32)]
        match_norms(one := copy.deepcopy(carried), images[:1])
        row["16 images"] = self.accuracy(one)
        row["matched in forward passes"] = forward_passes(copy.deepcopy(carried), images)
        match_norms(carried, images)
        row["512 images"] = self.accuracy(carried)
        row |= self.fit(carried, RATES["carried over"], seed)
        scratch = self.fit(self.converted(random, rule), RATES["from scratch"], seed)
        return row | {f"scratch {key}": value for key, value in scratch.items()}


def main(args):
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    experiment = Experiment(args)
    done = {(row["weights"], row["rule"]) for row in rows}
    for seed, weights in enumerate(args.weights):
        for rule in ["BN", *RULES]:
            if (weights, str(rule)) not in done:
                row = experiment.row(weights, rule, seed)
                rows.append({"weights": weights, "rule": str(rule)} | row)
                write_text(args.output, json.dumps(rows, indent=1))
                print(rows[-1], flush=True)
    rows = json.loads(args.output.read_text())
    names = [k for k in rows[-1] if k not in ("weights", "rule") and "rate" not in k]
    table = []
    for rule in ["BN", *map(str, RULES)]:
        held = [row for row in rows if row["rule"] == rule]
        cells = []
        for name in names:
            values = [row[name] for row in held if name in row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}" if values else "-")
        table.append([rule, *cells])
    print(tabulate(table, ["rule", *names], disable_numparse=True))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="a folder with train/ and val/")
    parser.add_argument("--arch", default="bottleneck20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--weights", nargs="+", required=True, help="of train_classifier.py")
    parser.add_argument("--output", type=Path, default=Path("output/carry_over.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
