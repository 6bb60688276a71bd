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

from gnpractical.analysis.output_dir import check_disk_space, check_output_dir
from gnpractical.datasets.coco_files import datasets_root
from gnpractical.tv import distributed, fasterrcnn_resnet_fpn, panoptic_fpn_resnet, quick
from gnpractical.tv.builders import DEPTHS
from gnpractical.tv.datasets import open_splits
from gnpractical.tv.evaluation import evaluate
from gnpractical.tv.training import Recipe, TorchvisionCheckpointer, train, write_scores

PANOPTIC = "panoptic_fpn_resnet"
HEADLINES = {"bbox/AP": "bbox AP", "segm/AP": "segm AP", "panoptic_seg/PQ": "panoptic_seg PQ"}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--model", choices=[PANOPTIC, "fasterrcnn_resnet_fpn"], default=PANOPTIC)
    add("--depth", type=int, choices=DEPTHS, default=50)
    add("--norm", default="GN_PRACTICAL", help="as in Detectron2's configs: GN_PRACTICAL, GN, ...")
    add("--weight-standardization", action="store_true", help="in backbone, FPN and box head")
    add("--quick", action="store_true", help="the small models on the embedded shapes, in minutes")
    add("--data-path", default=datasets_root(), metavar="DIR",
        help="folder of data sets (default: $DETECTRON2_DATASETS, or datasets)")
    add("--dataset", default="coco", help="folder in --data-path")
    add("--no-check-annotations", action="store_true", help="train on annotations as they are")
    add("--output-dir", required=True, metavar="DIR")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    add("--weights", default="", metavar="FILE", help="begin with these, or evaluate them")
    add("--checkpoint-mismatch", choices=["error", "warn", "ignore"], default="error",
        help="when a checkpoint's group counts are not the model's")
    add("--test-only", action="store_true", help="evaluate --weights, or with --resume the run's")
    add("--device", help="cuda, cpu, ...; default: cuda where there is one")
    add("--amp", action="store_true", help="mixed precision")
    add("--min-size", type=int, nargs="+", default=[640, 672, 704, 736, 768, 800],
        metavar="N", help="short side: in training one at random, in evaluation the last")
    add("--max-size", type=int, default=1333, metavar="N", help="long side at most")
    add("--iterations", type=int, default=270000, metavar="N")
    add("--batch-size", type=int, default=16, metavar="N", help="of all processes together")
    add("--lr", type=float, default=0.02)
    add("--warmup", type=int, default=1000, metavar="N", help="iterations of rising lr")
    add("--weight-decay", type=float, default=1e-4)
    add("--clip-grad-norm", type=float, default=0.0, metavar="X", help="0: not at all")
    add("--checkpoint-period", type=int, default=5000, metavar="N")
    add("--calibration-batches", type=int, default=2, metavar="N", help="for GN_MEASURED")
    add("--workers", type=int, default=2, metavar="N", help="loader processes")
    add("--seed", type=int, default=0)
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
        if (min(value) if isinstance(value, list) else value) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of the number of "
                         f"processes, {processes}")  # fmt: skip
    if args.test_only and not (args.resume or args.weights):
        raise ValueError("--test-only needs --weights FILE, or --resume for the run's checkpoint")
    check_output_dir(args.output_dir, "--output-dir")
    last = os.path.join(args.output_dir, "last_checkpoint")
    if args.test_only and not args.weights and not os.path.exists(last):
        raise ValueError(f"--resume: there is no checkpoint in {args.output_dir!r}")


def build(args, dataset):
    options = {key: getattr(args, key)
               for key in ("depth", "norm", "weight_standardization", "min_size", "max_size")}
    if args.model != PANOPTIC:
        options |= quick.FASTER_RCNN if args.quick else {}
        return fasterrcnn_resnet_fpn(num_classes=len(dataset.things) + 1, **options)
    options |= quick.PANOPTIC_FPN if args.quick else {}
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


def main():
    args = parse_args()
    try:
        check(args)
        device = distributed.start(args.device)
        log_to(args.output_dir)
        panoptic = args.model == PANOPTIC
        dataset, val = open_splits(
            args.data_path, args.dataset, panoptic=panoptic, check=not args.no_check_annotations
        )
        torch.manual_seed(args.seed)
        model = build(args, dataset).to(device)
        count = args.iterations // args.checkpoint_period + 1
        check_disk_space(args.output_dir, model, count, "--output-dir")
        if args.test_only:
            checkpointer = TorchvisionCheckpointer(
                model, args.output_dir, mismatch=args.checkpoint_mismatch
            )
            checkpointer.resume_or_load(args.weights, resume=args.resume)
        else:
            recipe = Recipe(
                args.iterations, args.batch_size, args.lr, args.warmup,
                weight_decay=args.weight_decay, clip_norm=args.clip_grad_norm,
                checkpoint_period=args.checkpoint_period, workers=args.workers, seed=args.seed,
                calibration_batches=args.calibration_batches, mixed_precision=args.amp,
            )  # fmt: skip
            train(model, dataset, recipe, args.output_dir, weights=args.weights,
                  resume=args.resume, mismatch=args.checkpoint_mismatch)  # fmt: skip
        folder = os.path.join(args.output_dir, "inference")
        scores = evaluate(model, val, folder, device)
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
    if scores:
        write_scores(args.output_dir, args.iterations, scores)
        text = ", ".join(f"{HEADLINES[k]} {v:.1f}" for k, v in scores.items() if k in HEADLINES)
        print(f"{text}. Group counts: {args.output_dir}/groups.json. "
              f"Predictions: {folder}/predictions.png")  # fmt: skip
    distributed.stop()


if __name__ == "__main__":
    main()
