#!/usr/bin/env python
"""Table 4 of the paper: a ResNet with GroupNorm on Oxford-IIIT Pet or Caltech-101.

    python tools/train_classifier.py --dataset pets --data datasets --output output/table4_pets

Rows are numbers of groups for the whole model, or rules that choose one for each layer. Training
is from scratch, with random resized crops and flips. Pets has its own test split; Caltech-101
has none, so a fifth of each category is drawn once, by seed 0, and the background category is
left out, as torchvision does. The paper's appendix with its hyperparameters is not available: the
recipe is this tool's. An interrupted experiment goes on where it was, within a run by the epoch.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import Caltech101, OxfordIIITPet
from torchvision.datasets.folder import default_loader
from tqdm import tqdm

import gnpractical
from gnpractical.analysis.experiments import (
    Results,
    check_options,
    format_summaries,
    norm_name_of,
    summarize,
)
from gnpractical.analysis.output_dir import write_text
from gnpractical.analysis.training import Recipe, first_line, fit, resolve_device
from gnpractical.layers import group_norm_from_name
from gnpractical.layers.pairing import require_resolved

# The values that can be told apart in the paper's Table 4, in %.
PAPER = {
    ("pets", "resnet50"): {"32": 22.894, "practical": 21.119},
    ("pets", "resnet101"): {"32": 24.067, "practical": 22.924},
    ("caltech101", "resnet50"): {"practical": 22.368},
    ("caltech101", "resnet101"): {"32": 22.781, "practical": 22.247},
}
ROWS = ["32", "1", "practical", "exact", "measured"]
LAYOUT = {
    "pets": "oxford-iiit-pet/images and annotations",
    "caltech101": "caltech101/101_ObjectCategories, BACKGROUND_Google among them",
}
CALIBRATION_BATCHES = 4


class Caltech(Caltech101):
    """Without SciPy, which torchvision imports for every image but only outlines need; in RGB."""

    def __getitem__(self, i):
        name = f"{self.categories[self.y[i]]}/image_{self.index[i]:04d}.jpg"
        image = default_loader(Path(self.root) / "101_ObjectCategories" / name)
        return self.transform(image), self.y[i]


def read_dataset(name, root, image_size):
    """(training set, test set, number of classes)"""
    normalize = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    train = T.Compose([T.RandomResizedCrop(image_size), T.RandomHorizontalFlip(), *normalize])
    test = T.Compose([T.Resize(image_size * 8 // 7), T.CenterCrop(image_size), *normalize])
    try:
        if name == "pets":
            sets = [
                OxfordIIITPet(root, split, transform=transform, download=True)
                for split, transform in (("trainval", train), ("test", test))
            ]
            return *sets, len(sets[0].classes)
        sets = [Caltech(root, transform=transform, download=True) for transform in (train, test)]
    except (OSError, RuntimeError, ValueError) as e:
        raise ValueError(
            f"--data must be a folder that holds {name} as torchvision lays it out "
            f"({LAYOUT[name]}), or can be written and {name} downloaded, but {root} does not work "
            f"({first_line(e)}). Put the dataset there or correct --data."
        ) from None
    indices = stratified_split(torch.tensor(sets[0].y), 0.2)
    return *map(Subset, sets, indices), len(sets[0].categories)


def stratified_split(labels, test_share):
    """Indices of (training, test): the share of every class, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique():
        (index,) = torch.where(labels == label)
        index = index[torch.randperm(len(index), generator=generator)]
        count = round(len(index) * test_share)
        test += index[:count].tolist()
        train += index[count:].tolist()
    return train, test


def build(args, row, seed, num_classes):
    torch.manual_seed(seed)
    norm = partial(group_norm_from_name, norm_name_of(row))
    return torchvision.models.get_model(args.arch, norm_layer=norm, num_classes=num_classes)


def choose_groups(args, row, num_classes, batches, device):
    """{path of a norm: its number of groups} for a row, printed and written to the output.

    Measured counts are measured once, on the first seed's untrained model, and read back later.
    """
    path = Path(args.output) / f"groups_{row}.json"
    model = build(args, row, 0, num_classes).to(device)
    if row == "measured" and path.exists():
        read_groups(model, path)
    elif row == "measured":
        few = list(islice(batches, CALIBRATION_BATCHES))
        gnpractical.calibrate(
            model, few, loss=lambda m, b: F.cross_entropy(m(b[0].to(device)), b[1].to(device))
        )
    require_resolved(model)
    rows = gnpractical.group_report(model)
    print(f"Row {row}:\n{gnpractical.format_report(rows)}\n", flush=True)
    write_text(path, json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    return {r.name: r.num_groups for r in rows}


def read_groups(model, path):
    try:
        for row in json.loads(path.read_text()):
            model.get_submodule(row["name"]).set_num_groups(row["num_groups"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path} must be a group report of this model, but it cannot be used ({e}). "
            f"Remove it to measure again."
        ) from None


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    archs = [f"resnet{depth}" for depth in (18, 34, 50, 101)]
    parser.add_argument("--arch", choices=archs, default="resnet50")
    parser.add_argument("--dataset", choices=list(LAYOUT), default="pets")
    parser.add_argument("--groups", nargs="+", default=ROWS, metavar="ROW", help="numbers, rules")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (3)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.025, help="at the start of the cosine")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4, help="processes that load images")
    parser.add_argument("--data", default="datasets", help="root of torchvision's datasets")
    parser.add_argument("--output", default="output/table4")
    parser.add_argument("--device", help="the GPU where there is one, else cpu")
    return parser.parse_args()


def main(args):
    settings = check_options(vars(args))
    device = resolve_device(args.device)
    train_set, test_set, num_classes = read_dataset(args.dataset, args.data, args.image_size)
    settings |= {"train_images": len(train_set), "test_images": len(test_set)}
    output = Path(args.output)
    results = Results(output / "results.json", settings | {"classes": num_classes})
    load = partial(
        DataLoader, batch_size=args.batch_size, num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    train_batches, test_batches = load(train_set, shuffle=True), load(test_set)
    recipe = Recipe(args.epochs, args.lr, args.momentum, args.weight_decay)

    # In ResNet-18 and -34 no layer narrows, so practical is 1 everywhere: that is trained once.
    groups, labels = {}, {}
    for row in sorted(dict.fromkeys(args.groups), key=lambda row: not row.isdecimal()):
        chosen = choose_groups(args, row, num_classes, train_batches, device)
        same = next((other for other in groups if groups[other] == chosen), row)
        groups[same] = chosen
        labels[same] = f"{labels[same]} *{row}" if same in labels else row

    def train(row, seed):
        model = build(args, row, seed, num_classes)
        for norm, num_groups in groups[row].items() if row == "measured" else ():
            model.get_submodule(norm).set_num_groups(num_groups)
        steps = args.epochs * len(train_batches)
        with tqdm(total=steps, desc=f"{row}, seed {seed}", leave=False) as progress:
            return fit(
                model, train_batches, test_batches, recipe, seed, device=device,
                mixed_precision=True, checkpoint=output / f"checkpoint_{row}_{seed}.pth",
                on_step=progress.update,
            )  # fmt: skip

    records = []
    with tqdm(results.run(list(groups), args.seeds, train), total=len(groups) * args.seeds) as runs:
        for r in runs:
            records.append(r)
            # Only now is the run in results.json and its checkpoint of no more use.
            (output / f"checkpoint_{r.row}_{r.seed}.pth").unlink(missing_ok=True)
            runs.write(f"Row {r.row}, seed {r.seed}: {r.test_error:.2f} %, {r.seconds:.0f} s")
    print(format_summaries(summarize(records), labels, PAPER.get((args.dataset, args.arch), {})))
    print(f"Runs: {results.path}. Group counts: {output}/groups_<row>.json.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except torch.cuda.OutOfMemoryError:
        sys.exit("error: the GPU's memory must hold a batch, but is too small. Lower --batch-size.")
    except (ValueError, OSError) as e:
        # An error in a loading process arrives with its traceback, the message last.
        sys.exit(f"error: {str(e).strip().splitlines()[-1]}")
