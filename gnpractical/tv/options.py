"""The command line of ``tools/train_torchvision.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gnpractical.layers.group_norm import norm_names
from gnpractical.tv import quick
from gnpractical.tv.builders import DEPTHS
from gnpractical.tv.run import MODELS, RunOptions

_DESCRIPTION = """Train or evaluate Faster R-CNN or Panoptic FPN on torchvision, without Detectron2.

    python tools/train_torchvision.py --quick --output-dir output/shapes
    torchrun --nproc-per-node 8 tools/train_torchvision.py --dataset coco --output-dir output/coco

The data set lies in <data-path>/<dataset>, in COCO's layout; gnp_shapes is made on first use.
"""


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_args(argv: Sequence[str] | None = None) -> RunOptions:
    """What the script's command line says; by default ``sys.argv``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,  # --quick is looked for by its whole name
    )
    parser.set_defaults(**vars(RunOptions(output_dir="")))
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("--model", choices=MODELS, help=" ")
    add("--depth", type=int, choices=DEPTHS, help="of the ResNet")
    add("--norm", help=f"{', '.join(norm_names())}, GN, BN, FrozenBN, or SyncBN (on GPUs)")
    add("--weight-standardization", action="store_true", help="in backbone, FPN and box head")
    add("--stride-in-1x1", action="store_true", help="where bottlenecks stride, as MSRA's ResNets")
    quick_help = "small models on the embedded shapes, in minutes; sets the defaults of the rest"
    add("--quick", action="store_true", help=quick_help)
    add("--data-path", metavar="DIR", help="folder of data sets: $DETECTRON2_DATASETS if set")
    add("--dataset", metavar="NAME", help="its folder in --data-path")
    add(
        "--no-check-annotations",
        dest="check_annotations",
        action="store_false",
        help="train on annotations as they are",
    )
    add("--output-dir", required=True, metavar="DIR")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    add("--weights", metavar="FILE", help="begin with these, or evaluate them")
    backbone_help = "begin with a ResNet's of torchvision, timm, mmdet, Detectron2, ..."
    add("--weights-backbone", metavar="FILE", help=backbone_help)
    match_help = "match norms that begin with the weights of other norms, on so many batches"
    add("--match-batches", **number, help=match_help)
    mismatch_help = "when a checkpoint's group counts are not the model's"
    add("--checkpoint-mismatch", choices=["error", "warn", "ignore"], help=mismatch_help)
    add("--test-only", action="store_true", help="evaluate --weights, or with --resume the run's")
    add("--device", help="cuda, cpu, ...; None: cuda where there is one")
    add("--amp", action="store_true", help="train in bfloat16, or float16 where a GPU has none")
    sizes = "short side: in training one at random, in evaluation the last"
    add("--min-size", nargs="+", **number, help=sizes)
    add("--max-size", **number, help="long side at most")
    add("--iterations", **number, help="steps of training")
    add("--stop-at", **number, help="stop after so many of them, to be resumed; 0: do not")
    add("--batch-size", **number, help="of all processes together")
    accumulate_help = "batches for one step: of 4 x 2 images it is that of 8, in the memory of 2"
    add("--accumulate", **number, help=accumulate_help)
    add("--lr", type=float, help="learning rate; falls along a cosine")
    add("--warmup", **number, help="iterations of rising lr")
    add("--momentum", type=float, help="of SGD")
    add("--weight-decay", type=float, help="not of norms")
    add("--clip-grad-norm", type=float, metavar="X", help="0: not at all")
    add("--checkpoint-period", **number, help="iterations; all are kept")
    add("--calibration-batches", **number, help="for GN_MEASURED")
    add("--workers", **number, help="loader processes")
    add("--seed", type=int, help=" ")
    if "--quick" in argv:
        parser.set_defaults(**quick.OPTIONS)
    return RunOptions(**vars(parser.parse_args(argv)))
