#!/usr/bin/env python
"""Train a classifier with different norms: on the data of the paper's Table 4, or on a folder.

    python tools/train_classifier.py --dataset pets --data datasets --output output/table4_pets
    python tools/train_classifier.py --dataset my_images --groups BN practical --output output/mine

Rows are numbers of groups for the whole model, rules that choose one for each layer, or BN; a run
of `measured` chooses on its own first batches. Training is from scratch, with random crops and
flips. Pets has its own test split; of Caltech-101 a fifth of each category is drawn once; a folder
has train/<class>/ and val/<class>/. The paper's hyperparameters are not available: the recipe is
this tool's. An interrupted experiment goes on where it was. Every run leaves its weights.
"""

import argparse
import json
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from gnpractical import calibrate, format_report, group_report
from gnpractical.layers import group_norm_from_name
from gnpractical.paper.classifier import fit
from gnpractical.paper.results import Results, check_options, format_results, norm_name_of
from gnpractical.runs.device import resolve_device
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.group_record import RECORD_KEY, group_record
from gnpractical.runs.output_dir import claim_output_dir, write_atomically, write_text
from gnpractical.tv.classification import ARCHS, LAYOUT, build_classifier, open_classes

# The values that can be told apart in the paper's Table 4, in %.
PAPER = {
    ("pets", "resnet50"): {"32": 22.894, "practical": 21.119},
    ("pets", "resnet101"): {"32": 24.067, "practical": 22.924},
    ("caltech101", "resnet50"): {"practical": 22.368},
    ("caltech101", "resnet101"): {"32": 22.781, "practical": 22.247},
}
ROWS = ["32", "1", "practical", "exact", "measured"]
CALIBRATION_BATCHES = 4


def report_groups(model, path):
    """Print and write the model's group report, and return the count of every norm."""
    rows = group_report(model)
    print(f"{path}:\n{format_report(rows)}\n", flush=True)
    write_text(path, json.dumps([vars(r) for r in rows], indent=1))
    return tuple(r.num_groups for r in rows)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHS, default="resnet50")
    parser.add_argument("--dataset", default="pets", help=f"{', '.join(LAYOUT)}, or a folder")
    rows = "numbers, rules, BN"
    parser.add_argument("--groups", nargs="+", default=ROWS, metavar="ROW", help=rows)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (3)")
    search_help = "stop the worse half of the rows at 1/8, 1/4, 1/2 of the epochs (needs Optuna)"
    parser.add_argument("--search", action="store_true", help=search_help)
    parser.add_argument("--storage", metavar="URL", help="of the search (a file in --output)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.025, help="at the start of the cosine")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4, help="processes that load images")
    parser.add_argument("--data", default="datasets", help="root of torchvision's datasets")
    parser.add_argument("--output", type=Path, default="output/table4")
    parser.add_argument("--device", help="the GPU where there is one, else cpu")
    return parser.parse_args()


def search(args, settings, build, train):
    from gnpractical.paper.search import find_best

    def scores_at(row, stop):
        paths = [args.output / f"checkpoint_{row}_{seed}.pth" for seed in range(args.seeds)]
        runs = [train(row, seed, path, stop) for seed, path in enumerate(paths)]
        return [100 - run.test_errors[stop - 1] for run in runs]

    for row in args.groups:  # or an error before any training
        build(row, 0)
    plan = args.groups, args.epochs, scores_at, args.output, args.storage
    print(find_best(*plan, settings | {"seeds": args.seeds}, score="accuracy in %"))


def main(args):
    rows = [row for row in args.groups if row != "BN"]
    settings = check_options(vars(args) | {"groups": rows})
    if not args.search:  # which several machines may share
        claim_output_dir(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    train_set, test_set, num_classes = open_classes(args.dataset, args.data, args.image_size)
    settings |= {"train_images": len(train_set), "test_images": len(test_set)}
    load = partial(DataLoader, num_workers=args.workers, pin_memory=on_gpu)
    train_batches = load(train_set, args.batch_size, shuffle=True)
    test_batches = load(test_set, args.batch_size)
    recipe = {name: settings[name] for name in ("epochs", "lr", "momentum", "weight_decay")}

    def build(row, seed):
        torch.manual_seed(seed)
        ours = row != "BN" and partial(group_norm_from_name, norm_name_of(row))
        return build_classifier(args.arch, ours or nn.BatchNorm2d, num_classes).to(device)

    def train(row, seed, checkpoint, stop_at=None):
        model = build(row, seed)
        if row == "measured" and not checkpoint.exists():  # else it brings the counts
            few = [images.to(device) for images, _ in islice(train_batches, CALIBRATION_BATCHES)]
            calibrate(model, few)
            report_groups(model, args.output / f"groups_{row}_{seed}.json")
        options = recipe | {"mixed": on_gpu, "stop_at": stop_at}
        done = fit(model, train_batches, test_batches, seed, checkpoint, **options)
        weights = {"model": model.state_dict(), RECORD_KEY: group_record(model)}
        path = args.output / f"weights_{row}_{seed}.pth"
        write_atomically(path, partial(torch.save, weights))
        return done

    if args.search:
        search(args, settings, build, train)
        return
    # In ResNet-18 and -34 no layer narrows, so practical is 1 everywhere: that is trained once.
    rows, labels = {}, {}
    for row in sorted(dict.fromkeys(args.groups), key=lambda row: not row.isdecimal()):
        counts = report_groups(build(row, 0), args.output / f"groups_{row}.json")
        same = rows.setdefault(counts, row)
        labels[same] = row if same == row else f"{labels[same]} *{row}"

    results = Results(args.output / "results.json", settings | {"classes": num_classes})
    runs = results.run(list(labels), args.seeds, train)
    print(format_results(runs, labels, PAPER.get((args.dataset, args.arch), {})))
    print(
        f"Runs: {results.path}. Group counts: {args.output}/groups_<row>.json. "
        f"Weights: {args.output}/weights_<row>_<seed>.pth."
    )


if __name__ == "__main__":
    with in_one_line():
        main(parse_args())
