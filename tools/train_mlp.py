#!/usr/bin/env python
"""Table 3 and Figure 2 of the paper: an MLP on MNIST with every number of groups.

    python tools/train_mlp.py --data datasets --output output/table3

784-512-10: Linear, GroupNorm, ReLU, Linear. Three seeds for each of G = 1, 2, 4, ... 512 and for
the G that the rules practical, exact and measured choose. Pixels are scaled to mean 0 and standard
deviation 1 over the training set; no augmentation. The paper's appendix with its hyperparameters
is not available: the recipe is this tool's, and only the shape of the table can be expected to
agree. An interrupted experiment goes on where it was, within a run by the epoch.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torchvision.datasets import MNIST

from gnpractical import calibrate
from gnpractical.layers import group_norm_from_name
from gnpractical.measure.plots import learning_curves
from gnpractical.num_groups import check_num_groups
from gnpractical.paper.classifier import fit
from gnpractical.paper.results import Results, check_options, format_results, norm_name_of
from gnpractical.runs.device import resolve_device
from gnpractical.runs.errors import first_line, in_one_line

PIXELS, HIDDEN, CLASSES = 28 * 28, 512, 10
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to [0, 1]
ROWS = [*(str(2**i) for i in range(10)), "practical", "exact", "measured"]
PAPER = {
    "1": 1.827,
    "2": 1.720,
    "4": 1.773,
    "8": 1.730,
    "16": 1.727,
    "32": 1.720,
    "64": 1.670,
    "128": 1.753,
    "256": 3.240,
    "512": 88.650,
}


class Shuffled:
    """Batches of one tensor in a new random order each time: no loader is as fast."""

    def __init__(self, images, labels, batch_size):
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        for index in torch.randperm(len(self.images)).split(self.batch_size):
            yield self.images[index], self.labels[index]


def read_mnist(root, train):
    try:
        data = MNIST(root, train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as e:
        raise ValueError(
            f"--data must be a folder that holds MNIST, or can be written and MNIST downloaded, "
            f"but {root} does not work ({first_line(e)}). Put the four original .gz files into "
            f"{Path(root) / 'MNIST' / 'raw'}."
        ) from None
    return ((data.data.float() / 255 - MEAN) / STD).reshape(-1, PIXELS), data.targets


def build(norm):
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), norm, nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def num_groups_of(row, images):
    """Return the G of a row; a measured one is of the first seed's untrained model."""
    torch.manual_seed(0)
    model = build(group_norm_from_name(norm_name_of(row), HIDDEN))
    if row == "measured":
        calibrate(model, images[:2048].split(256))
    check_num_groups(model[1].num_groups, HIDDEN)
    return model[1].num_groups


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", default=ROWS, metavar="ROW", help="numbers, rules")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (3)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.1, help="at the start of the cosine")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--data", default="datasets", help="root of torchvision's MNIST")
    parser.add_argument("--output", type=Path, default="output/table3")
    parser.add_argument("--device", help="the GPU where there is one, else cpu")
    return parser.parse_args()


def main(args):
    settings = check_options(vars(args))
    device = resolve_device(args.device)
    images, labels = read_mnist(args.data, train=True)
    test_images, test_labels = read_mnist(args.data, train=False)
    # Rules are other names of the same rows: one G is trained once.
    labels_of = {}
    for row in args.groups:
        label = labels_of.setdefault(num_groups_of(row, images), [])
        label += [] if row.isdecimal() else [f"*{row}"]
    names = {str(g): " ".join([str(g), *dict.fromkeys(r)]) for g, r in sorted(labels_of.items())}

    recipe = {name: settings[name] for name in ("epochs", "lr", "momentum", "weight_decay")}
    settings |= {"train_images": len(images), "test_images": len(test_images)}
    results = Results(args.output / "results.json", settings)
    train_batches = Shuffled(images.to(device), labels.to(device), args.batch_size)
    test_batches = list(
        zip(test_images.to(device).split(1000), test_labels.to(device).split(1000), strict=True)
    )

    def train(row, seed, checkpoint):
        torch.manual_seed(seed)
        # Not PracticalGroupNorm: it refuses to train 512 groups of a single value, which are all
        # zero. The paper trained them (88.65 %, one answer for every image), so this table does.
        model = build(nn.GroupNorm(int(row), HIDDEN)).to(device)
        return fit(model, train_batches, test_batches, seed, checkpoint, **recipe)

    runs = results.run(list(names), args.seeds, train)
    print(format_results(runs, names, PAPER))
    curves = {
        names[row]: [fmean(losses) for losses in zip(*(r.train_losses for r in held), strict=True)]
        for row, held in runs.items()
    }
    figure = args.output / "train_loss.png"
    learning_curves(curves, figure, "train loss", highlight="practical")
    print(f"Learning curves: {figure}. Runs: {results.path}.")


if __name__ == "__main__":
    with in_one_line():
        main(parse_args())
