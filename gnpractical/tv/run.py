"""One run of ``tools/train_torchvision.py``: data, model, training, evaluation."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from gnpractical.datasets.coco_files import datasets_root
from gnpractical.runs.output_dir import (
    check_disk_space,
    check_output_dir,
    claim_output_dir,
    write_group_report,
    write_text,
)
from gnpractical.runs.saved_run import OPTIONS_FILE
from gnpractical.tv import distributed, fasterrcnn_resnet_fpn, panoptic_fpn_resnet, quick
from gnpractical.tv.checkpoint import TorchvisionCheckpointer, require_measured
from gnpractical.tv.datasets import CocoImages, check_categories, open_split
from gnpractical.tv.evaluation import evaluate
from gnpractical.tv.training import TrainingRecipe, train, write_scores

MODELS = ("panoptic_fpn_resnet", "fasterrcnn_resnet_fpn")
HEADLINES = ("bbox/AP", "segm/AP", "panoptic_seg/PQ")  # the scores that are printed at the end
# The least value of each number among the options.
_LEAST = dict.fromkeys(("iterations", "batch_size", "checkpoint_period", "max_size"), 1)
_LEAST |= dict.fromkeys(("calibration_batches", "min_size", "accumulate"), 1)
_LEAST |= dict.fromkeys(("warmup", "stop_at", "match_batches", "workers"), 0)
_LEAST |= dict.fromkeys(("lr", "momentum", "weight_decay", "clip_grad_norm"), 0)


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrainingRecipe):
    """The script's options; its ``--help`` describes them."""

    output_dir: str
    model: str = MODELS[0]
    depth: int = 50
    norm: str = "GN_PRACTICAL"
    weight_standardization: bool = False
    quick: bool = False
    data_path: str = field(default_factory=datasets_root)
    dataset: str = "coco"
    check_annotations: bool = True
    stride_in_1x1: bool = False
    weights: str = ""
    weights_backbone: str = ""
    resume: bool = False
    checkpoint_mismatch: str = "error"
    test_only: bool = False
    device: str | None = None
    min_size: Sequence[int] = (640, 672, 704, 736, 768, 800)
    max_size: int = 1333


def run(options: RunOptions) -> None:
    """Train, unless only to be tested, evaluate, and print where the results are.

    Raises:
        ValueError, OSError: The options contradict one another, or the data, the weights or the
            output folder are not as they must be.
        FloatingPointError: The loss is not finite.
    """
    _check(options)
    device = distributed.start(options.device)
    if distributed.rank() == 0:
        claim_output_dir(options.output_dir, "--output-dir")
    _log_to(options.output_dir)
    val = _open(options, "val")
    if not options.test_only:
        train_split = _open(options, "train")
        check_categories(train_split, val)
        if options.match_batches * options.batch_size > len(train_split):
            raise ValueError(
                f"--match-batches {options.match_batches} of --batch-size {options.batch_size} "
                f"are more than the {len(train_split)} training images; a few dozen are enough"
            )
    torch.manual_seed(options.seed)
    model = build(options, len(val.things), len(val.stuff or ())).to(device)
    if options.test_only:
        iteration = _load(model, options, val)
    else:
        kept = options.iterations // options.checkpoint_period + 1
        check_disk_space(options.output_dir, model, kept, "--output-dir")
        if distributed.rank() == 0:
            write_text(Path(options.output_dir, OPTIONS_FILE), json.dumps(vars(options), indent=1))
        train(
            model,
            train_split,
            options,
            options.output_dir,
            weights=options.weights,
            weights_backbone=options.weights_backbone,
            resume=options.resume,
            mismatch=options.checkpoint_mismatch,
        )
        iteration = options.last_iteration
    folder = os.path.join(options.output_dir, "inference")
    scores = evaluate(model, val, folder, device, options.workers)
    if scores:  # on rank 0
        write_scores(options.output_dir, iteration, scores)
        text = ", ".join(f"{k.replace('/', ' ')} {scores[k]:.1f}" for k in HEADLINES if k in scores)
        print(
            f"{text}. Group counts: {options.output_dir}/groups.json. "
            f"Predictions: {folder}/predictions.png"
        )
    if dist.is_initialized():  # only after success: after an error the others may never come here
        dist.destroy_process_group()


def check_numbers(options: RunOptions) -> None:
    """Raise ValueError for a number that is below its least value."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if not (min(value) if name == "min_size" else value) >= least:  # nor nan
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def _check(options: RunOptions) -> None:
    check_numbers(options)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % processes and not options.test_only:
        raise ValueError(
            f"--batch-size {options.batch_size} must be a multiple of the number of processes, "
            f"{processes}"
        )
    if options.test_only and options.resume == bool(options.weights):
        raise ValueError(
            "--test-only needs either --weights FILE, or --resume for the run's last checkpoint"
        )
    if options.weights and options.weights_backbone:
        raise ValueError("--weights and --weights-backbone exclude each other: give one of them")
    check_output_dir(options.output_dir, "--output-dir")


def _log_to(output_dir: str) -> None:
    """Log to the console and to ``log.txt``; processes other than rank 0 log only warnings."""
    file = logging.FileHandler(os.path.join(output_dir, "log.txt"))
    handlers = [logging.StreamHandler(sys.stdout), file]
    level = logging.INFO if distributed.rank() == 0 else logging.WARNING
    logging.basicConfig(
        level=level, handlers=handlers, format="[%(asctime)s] %(message)s", datefmt="%m/%d %H:%M:%S"
    )


def _open(options: RunOptions, split: str) -> CocoImages:
    panoptic, check = options.model == "panoptic_fpn_resnet", options.check_annotations
    return open_split(options.data_path, options.dataset, split, panoptic=panoptic, check=check)


def build(options: RunOptions, num_things: int, num_stuff: int) -> nn.Module:
    """The model, at its random start."""
    if options.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {options.model!r}")
    names = ("depth", "norm", "weight_standardization", "stride_in_1x1", "min_size", "max_size")
    arguments = {name: getattr(options, name) for name in names}
    if options.model == "fasterrcnn_resnet_fpn":
        arguments |= quick.faster_rcnn() if options.quick else {}
        return fasterrcnn_resnet_fpn(num_classes=num_things + 1, **arguments)
    arguments |= quick.panoptic_fpn() if options.quick else {}
    return panoptic_fpn_resnet(num_things=num_things, num_stuff=num_stuff, **arguments)


def _load(model: nn.Module, options: RunOptions, dataset: CocoImages) -> int:
    """Load what is to be evaluated, and return the iteration at which it was saved."""
    checkpointer = TorchvisionCheckpointer(
        model,
        options.output_dir,
        mismatch=options.checkpoint_mismatch,
        classes=dataset.classes,
    )
    path = options.weights or checkpointer.get_checkpoint_file()
    if not path:
        raise ValueError(f"--resume: there is no checkpoint in {options.output_dir!r}")
    iteration = checkpointer.load_all(path, checkpointables=[]).get("iteration", -1)
    require_measured(model, path)
    if distributed.rank() == 0:
        write_group_report(model, options.output_dir)
    return iteration
