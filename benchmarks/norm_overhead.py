#!/usr/bin/env python
"""What GN_PRACTICAL costs against Detectron2's GN (32 groups), the two interleaved in one run.

    python benchmarks/norm_overhead.py step [--steps 15] [--size 128]
    python benchmarks/norm_overhead.py ws [--steps 15] [--size 128]
    python benchmarks/norm_overhead.py build [--repeats 7]

`step`: one training step (forward, backward, SGD) of Panoptic FPN R-50 with GroupNorm in every
part, on one batch of random images and targets. `ws`: the same of Faster R-CNN R-50 at GN_PRACTICAL
with weight standardization in backbone, FPN and box head, against without. `build`: building
R-101-FPN, and the part of it spent resolving group counts. Medians, and the quartiles of the ratio
over the repeats.
"""

import argparse
import platform
import statistics
import time

import detectron2
import torch
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from gnpractical.d2 import load_config
from gnpractical.layers import pairing

SECTIONS = ("GNP", "RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")


def config(norm, *opts):
    cfg = load_config("configs/pfpn_gnp_full.yaml", opts)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    for section in SECTIONS:
        cfg.MODEL[section].NORM = norm
    return cfg


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


def norm_configs():
    return {norm: config(norm, "INPUT.MASK_FORMAT", "bitmask") for norm in ("GN", "GN_PRACTICAL")}


def standardization_configs():
    cfgs = {}
    for name, parts in (("plain", []), ("WS", ["backbone", "roi_heads.box_head"])):
        cfgs[name] = load_config("configs/faster_rcnn_gnp_ws.yaml")
        cfgs[name].MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        cfgs[name].MODEL.GNP.WEIGHT_STANDARDIZATION = parts
    return cfgs


def step_times(cfgs, steps, size):
    runs = {}
    for name, cfg in cfgs.items():
        torch.manual_seed(0)
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
        model = build_model(cfg).train()
        runs[name] = model, torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = random_batch(size)
    times = {norm: [] for norm in runs}
    with EventStorage():
        for i in range(steps + 2):
            for norm, (model, optimizer) in runs.items():
                start = time.perf_counter()
                optimizer.zero_grad()
                sum(model(batch).values()).backward()
                optimizer.step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i >= 2:
                    times[norm].append(time.perf_counter() - start)
    return times


def build_times(repeats):
    times = {"GN": [], "GN_PRACTICAL": [], "resolving": []}
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
            build_backbone(cfg)
            if i:
                times[norm].append(time.perf_counter() - start)
        if i:
            times["resolving"].append(spent[0])
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "ws", "build"))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    what = args.what
    if what == "build":
        times = build_times(args.repeats)
    else:
        cfgs = norm_configs() if what == "step" else standardization_configs()
        times = step_times(cfgs, args.steps, args.size)
    base, other = list(times)[:2]
    ratios = [b / a for a, b in zip(times[base], times[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"torch {torch.__version__}, detectron2 {detectron2.__version__}, "
        f"{device or platform.machine()}, {torch.get_num_threads()} threads"
    )
    for name, values in times.items():
        print(f"{what} {name}: median {statistics.median(values):.4f} s of {len(values)}")
    print(f"{other} / {base}: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    if what == "build":
        share = [r / t for r, t in zip(times["resolving"], times["GN_PRACTICAL"], strict=True)]
        print(f"resolving / building: median {statistics.median(share):.5f}")


if __name__ == "__main__":
    main()
