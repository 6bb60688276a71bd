#!/usr/bin/env python
"""Train or evaluate Faster R-CNN or Panoptic FPN on torchvision, without Detectron2.

    python tools/train_torchvision.py --quick --output-dir output/shapes
    torchrun --nproc-per-node 8 tools/train_torchvision.py --dataset coco --output-dir output/coco

The data set lies in <data-path>/<dataset>, in COCO's layout; gnp_shapes is made on first use.
"""

import argparse
import logging
import os
import sys

import torch

from gnpractical.analysis.calibration import measured_norms
from gnpractical.analysis.output_dir import (
    check_disk_space,
    check_output_dir,
    write_group_report,
)
from gnpractical.datasets.coco_files import datasets_root
from gnpractical.tv import distributed, fasterrcnn_resnet_fpn, panoptic_fpn_resnet, quick
from gnpractical.tv.builders import DEPTHS
from gnpractical.tv.checkpoint import TorchvisionCheckpointer
from gnpractical.tv.datasets import check_categories, open_split
from gnpractical.tv.evaluation import evaluate
from gnpractical.tv.training import Recipe, train, write_scores

PANOPTIC = "panoptic_fpn_resnet"
HEADLINES = {"bbox/AP": "bbox AP", "segm/AP": "segm AP", "panoptic_seg/PQ": "panoptic_seg PQ"}


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=_Formatter,
        allow_abbrev=False,  # --quick is looked for by its whole name
    )  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--model", choices=[PANOPTIC, "fasterrcnn_resnet_fpn"], default=PANOPTIC, help=" ")
    add("--depth", type=int, choices=DEPTHS, default=50, help="of the ResNet")
    add("--norm", default="GN_PRACTICAL",
        help="GN_PRACTICAL, GN_CLOSEST, GN_EXACT, GN_MEASURED, GN_<k>, GN, BN, FrozenBN, or SyncBN "
        "(on GPUs)")
    add("--weight-standardization", action="store_true", help="in backbone, FPN and box head")
    add("--quick", action="store_true",
        help="small models on the embedded shapes, in minutes; sets the defaults that follow")
    add("--data-path", default=datasets_root(), metavar="DIR",
        help="folder of data sets: $DETECTRON2_DATASETS if set")
    add("--dataset", default="coco", metavar="NAME", help="its folder in --data-path")
    add("--no-check-annotations", action="store_true", help="train on annotations as they are")
    add("--output-dir", required=True, metavar="DIR")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    add("--weights", default="", metavar="FILE", help="begin with these, or evaluate them")
    add("--checkpoint-mismatch", choices=["error", "warn", "ignore"], default="error",
        help="when a checkpoint's group counts are not the model's")
    add("--test-only", action="store_true", help="evaluate --weights, or with --resume the run's")
    add("--device", help="cuda, cpu, ...; None: cuda where there is one")
    add("--amp", action="store_true",
        help="train in bfloat16, or float16 on GPUs that have no bfloat16")
    add("--min-size", type=int, nargs="+", default=[640, 672, 704, 736, 768, 800],
        metavar="N", help="short side: in training one at random, in evaluation the last")
    add("--max-size", type=int, default=1333, metavar="N", help="long side at most")
    add("--iterations", type=int, default=270000, metavar="N", help="steps of training")
    add("--batch-size", type=int, default=16, metavar="N", help="of all processes together")
    add("--lr", type=float, default=0.02, help="learning rate; falls along a cosine")
    add("--warmup", type=int, default=1000, metavar="N", help="iterations of rising lr")
    add("--weight-decay", type=float, default=1e-4, help="not of norms")
    add("--clip-grad-norm", type=float, default=0.0, metavar="X", help="0: not at all")
    add("--checkpoint-period", type=int, default=5000, metavar="N", help="iterations; all are kept")
    add("--calibration-batches", type=int, default=2, metavar="N", help="for GN_MEASURED")
    add("--workers", type=int, default=2, metavar="N", help="loader processes")
    add("--seed", type=int, default=0, help=" ")
    # fmt: on
    if "--quick" in sys.argv:
        parser.set_defaults(**quick.OPTIONS)
    return parser.parse_args()


def check(args):
    least = dict.fromkeys(("iterations", "batch_size", "checkpoint_period", "max_size"), 1)
    least |= dict.fromkeys(("calibration_batches", "min_size"), 1)
    least |= dict.fromkeys(("warmup", "workers", "lr", "weight_decay", "clip_grad_norm"), 0)
    for name, lowest in least.items():
        value = getattr(args, name)
        if not (min(value) if isinstance(value, list) else value) >= lowest:  # nor nan
            raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes and not args.test_only:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of the number of "
                         f"processes, {processes}")  # fmt: skip
    if args.test_only and args.resume == bool(args.weights):
        raise ValueError("--test-only needs either --weights FILE, or --resume for the run's "
                         "last checkpoint")  # fmt: skip
    check_output_dir(args.output_dir, "--output-dir")
    last = os.path.join(args.output_dir, "last_checkpoint")
    if args.test_only and args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no checkpoint in {args.output_dir!r}")


def build(args, dataset):
    options = {key: getattr(args, key)
               for key in ("depth", "norm", "weight_standardization", "min_size", "max_size")}
    if args.model != PANOPTIC:
        options |= quick.faster_rcnn() if args.quick else {}
        return fasterrcnn_resnet_fpn(num_classes=len(dataset.things) + 1, **options)
    options |= quick.panoptic_fpn() if args.quick else {}
    return panoptic_fpn_resnet(
        num_things=len(dataset.things), num_stuff=len(dataset.stuff), **options
    )


def log_to(output_dir):
    handlers = [logging.StreamHandler(sys.stdout)]
    if distributed.rank() == 0:
        handlers.append(logging.FileHandler(os.path.join(output_dir, "log.txt")))
    level = logging.INFO if distributed.rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, handlers=handlers, format="[%(asctime)s] %(message)s",
                        datefmt="%m/%d %H:%M:%S")  # fmt: skip


def run(args):
    """Train, unless only to be tested, and evaluate; the scores and their iteration."""
    device = distributed.start(args.device)
    log_to(args.output_dir)
    splits = ["val"] if args.test_only else ["val", "train"]
    val, *train_split = [
        open_split(args.data_path, args.dataset, split, panoptic=args.model == PANOPTIC,
                   check=not args.no_check_annotations)
        for split in splits
    ]  # fmt: skip
    torch.manual_seed(args.seed)
    model = build(args, val).to(device)
    if args.test_only:
        checkpointer = TorchvisionCheckpointer(
            model, args.output_dir, mismatch=args.checkpoint_mismatch
        )
        path = args.weights or checkpointer.get_checkpoint_file()
        iteration = checkpointer.load_all(path, checkpointables=[]).get("iteration", -1)
        if any(norm.num_groups is None for norm in measured_norms(model).values()):
            raise ValueError(f"{path} has no measured group counts: it was not trained with --norm "
                             f"GN_MEASURED")  # fmt: skip
        if distributed.rank() == 0:
            write_group_report(model, args.output_dir)
    else:
        check_categories(*train_split, val)
        kept = args.iterations // args.checkpoint_period + 1
        check_disk_space(args.output_dir, model, kept, "--output-dir")
        recipe = Recipe(
            args.iterations, args.batch_size, args.lr, args.warmup,
            weight_decay=args.weight_decay, clip_norm=args.clip_grad_norm,
            checkpoint_period=args.checkpoint_period, workers=args.workers, seed=args.seed,
            calibration_batches=args.calibration_batches, mixed_precision=args.amp,
        )  # fmt: skip
        train(model, *train_split, recipe, args.output_dir, weights=args.weights,
              resume=args.resume, mismatch=args.checkpoint_mismatch)  # fmt: skip
        iteration = args.iterations - 1
    folder = os.path.join(args.output_dir, "inference")
    return evaluate(model, val, folder, device, args.workers), iteration


def main():
    args = parse_args()
    try:
        check(args)
        scores, iteration = run(args)
    except (ValueError, OSError, FloatingPointError) as e:
        # Of an error in a loader process the last line is its message.
        lines = str(e).strip().splitlines() or [type(e).__name__]
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ')}")
    if scores:
        write_scores(args.output_dir, iteration, scores)
        text = ", ".join(f"{HEADLINES[k]} {v:.1f}" for k, v in scores.items() if k in HEADLINES)
        print(f"{text}. Group counts: {args.output_dir}/groups.json. "
              f"Predictions: {args.output_dir}/inference/predictions.png")  # fmt: skip
    distributed.stop()


if __name__ == "__main__":
    main()
