#!/usr/bin/env python
"""What GN_PRACTICAL costs in Detectron2's models, the variants interleaved in one run.

    python benchmarks/norm_overhead.py step [--steps 15] [--size 128] [--dtype bfloat16]
    python benchmarks/norm_overhead.py ws [--steps 15] [--size 128]
    python benchmarks/norm_overhead.py memory [--size 128]
    python benchmarks/norm_overhead.py build [--repeats 7]

`step`: one training step (forward, backward, SGD) of Panoptic FPN R-50 on one batch of random
images and targets, with Detectron2's GN (32 groups) in every part, with GN_PRACTICAL, the same in
channels_last, and with FrozenBN (in the backbone; no norm elsewhere). `ws`: the same of Faster
R-CNN R-50 at GN_PRACTICAL without weight standardization, with it in backbone, FPN and box head,
with it at GN, and with FrozenBN. A dtype runs them under autocast. `memory`: the peak of every
variant's process over three steps. `build`: building R-101-FPN, the part of it spent resolving
group counts, a group report, and a conversion to another rule. Medians, and the quartiles of the
ratios to the first variant.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import detectron2
import torch
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from gnpractical import convert, group_report
from gnpractical.d2 import load_config
from gnpractical.layers import pairing

SECTIONS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")


def config(norm, *opts, file="configs/pfpn_gnp_full.yaml"):
    cfg = load_config(
        file, ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64", "INPUT.MASK_FORMAT", "bitmask", *opts]
    )
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    for section in SECTIONS:
        cfg.MODEL[section].NORM = "" if norm == "FrozenBN" else norm
    cfg.MODEL.RESNETS.NORM = norm
    return cfg


def faster_rcnn(norm, weight_standardization=True):
    cfg = config(norm, file="configs/faster_rcnn_gnp_ws.yaml")
    parts = ["backbone", "roi_heads.box_head"] if weight_standardization else []
    cfg.MODEL.GNP.WEIGHT_STANDARDIZATION = parts
    return cfg


CHANNELS_LAST = "GN_PRACTICAL channels_last"
VARIANTS = {
    "step": {
        "GN": lambda: config("GN"),
        "GN_PRACTICAL": lambda: config("GN_PRACTICAL"),
        CHANNELS_LAST: lambda: config("GN_PRACTICAL"),
        "FrozenBN": lambda: config("FrozenBN"),
    },
    "ws": {
        "GN_PRACTICAL": lambda: faster_rcnn("GN_PRACTICAL", False),
        "GN_PRACTICAL+WS": lambda: faster_rcnn("GN_PRACTICAL"),
        "GN+WS": lambda: faster_rcnn("GN"),
        "FrozenBN": lambda: faster_rcnn("FrozenBN", False),
    },
}


def random_batch(size, images=2, boxes=5):
    classes = len(_get_builtin_metadata("coco_panoptic_separated")["thing_classes"])
    batch = []
    for _ in range(images):
        instances = Instances((size, size))
        corners = torch.rand(boxes, 2) * size / 2
        instances.gt_boxes = Boxes(torch.cat([corners, corners + size / 3], dim=1))
        instances.gt_classes = torch.randint(classes, (boxes,))
        instances.gt_masks = BitMasks(torch.rand(boxes, size, size) > 0.5)
        batch.append(
            {
                "image": torch.randint(255, (3, size, size), dtype=torch.uint8),
                "instances": instances,
                "sem_seg": torch.randint(54, (size, size)),
            }
        )
    return batch


def trainer(what, name):
    torch.manual_seed(0)
    model = build_model(VARIANTS[what][name]()).train()
    if name == CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=1e-4)


def step(model, optimizer, batch, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer.zero_grad()
    with torch.autocast(device, dtype=dtype) if dtype else nullcontext():
        losses = model(batch)
    sum(losses.values()).backward()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def step_times(what, steps, size, dtype):
    runs = {name: trainer(what, name) for name in VARIANTS[what]}
    batch = random_batch(size)
    times = {name: [] for name in runs}
    with EventStorage():
        for i in range(steps + 2):
            for name, (model, optimizer) in runs.items():
                start = time.perf_counter()
                step(model, optimizer, batch, dtype)
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
    return times


def peak_memory(what, name, size):
    model, optimizer = trainer(what, name)
    with EventStorage():
        for _ in range(3):
            step(model, optimizer, random_batch(size), None)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_memory(size):
    spawn = multiprocessing.get_context("spawn")
    for what, variants in VARIANTS.items():
        for name in variants:
            with ProcessPoolExecutor(1, spawn) as process:
                peak = process.submit(peak_memory, what, name, size).result()
            print(f"{what} {name}: peak {peak / 2**20:.0f} MiB", flush=True)


def build_times(repeats):
    times = {"GN": [], "GN_PRACTICAL": [], "resolving": [], "report": [], "convert": []}
    resolve = pairing._feeding_layer

    def timed(*args):
        start = time.perf_counter()
        try:
            return resolve(*args)
        finally:
            spent[0] += time.perf_counter() - start

    pairing._feeding_layer = timed
    for i in range(repeats + 1):
        for norm in ("GN", "GN_PRACTICAL"):
            spent = [0.0]
            cfg = config(norm, "MODEL.RESNETS.DEPTH", "101")
            start = time.perf_counter()
            backbone = build_backbone(cfg)
            if i:
                times[norm].append(time.perf_counter() - start)
        start = time.perf_counter()
        group_report(backbone)
        reported = time.perf_counter()
        convert(backbone, rule="closest")
        if i:
            times["resolving"].append(spent[0])
            times["report"].append(reported - start)
            times["convert"].append(time.perf_counter() - reported)
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*VARIANTS, "memory", "build"))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"torch {torch.__version__}, detectron2 {detectron2.__version__}, "
        f"{device or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if args.what == "memory":
        return print_memory(args.size)
    if args.what == "build":
        times = build_times(args.repeats)
    else:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        times = step_times(args.what, args.steps, args.size, dtype)
    first = next(iter(times))
    for name, values in times.items():
        ratios = [b / a for a, b in zip(times[first], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{args.what} {name}: median {statistics.median(values):.4f} s of {len(values)}, "
            f"over {first} {middle:.3f} ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
