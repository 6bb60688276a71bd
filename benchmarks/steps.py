#!/usr/bin/env python
"""Whole training steps and inference of detectors by norm, precision and memory format.

    python benchmarks/steps.py [--frameworks torchvision detectron2] [--steps 15] [--size 128]

Panoptic FPN and Faster R-CNN, R-50, of both frameworks on two random images with random targets:
forward, backward and SGD, the variants interleaved in one run. Variants are norms, with and without
weight standardization (+WS), precisions and channels_last; what they are compared with is GN, 32
groups everywhere, of the same precision. FrozenBN is in the backbone of Detectron2's models and
everywhere in torchvision's. On a GPU images are 800x1333 pixels, and bfloat16 and channels_last are
added. `ratio` is the median of the steps' ratios to GN, with their quartiles; `norms` the share of
norms in the time of all operations (torch's profiler; FrozenBN has no operation of its own); `MiB`
the peak of the memory that training takes beyond what was there before; on a CPU it is not
measured. `inference` is a forward pass of one image in evaluation mode.
"""

import argparse
import itertools
import platform
import random
import statistics
import time
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = ("panoptic_fpn", "faster_rcnn")
NORMS = ("GN", "GN_PRACTICAL", "GN_CPG_4", "GN+WS", "GN_PRACTICAL+WS", "FrozenBN")
# Precision, and whether in channels_last.
CPU_SETTINGS = [("float32", False)]
GPU_SETTINGS = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
FRAMEWORKS = [name for name in ("torchvision", "detectron2") if find_spec(name)]
LARGE, BOXES = (800, 1333), 8
PROPOSALS_ON_CPU = 64  # an image; 512 on a GPU
FLOATS = (*5 * ("",), *4 * (".3f",), ".1%", ".0f", ".4f")
# Names of the profiler's operations that are norms.
_NORM_OPERATIONS = ("native_group_norm", "native_batch_norm", "cudnn_batch_norm")


def _targets(size, images=2):
    """Random images, boxes, classes, masks and semantic labels."""
    height, width = size
    for _ in range(images):
        corners = torch.rand(BOXES, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corners, corners * 1.5 + torch.tensor([width, height]) / 4], dim=1)
        yield {
            "image": torch.randint(256, (3, *size), dtype=torch.uint8),
            "boxes": boxes,
            "labels": torch.randint(1, 80, (BOXES,)),
            "masks": torch.rand(BOXES, *size) > 0.5,
            "semantic": torch.randint(54, size),
        }


def torchvision_model(kind, norm, standardized, size, device, small):
    """A model, and its arguments in training and in evaluation."""
    from gnpractical.tv import fasterrcnn_resnet_fpn, panoptic_fpn_resnet, quick

    options = {"norm": norm, "weight_standardization": standardized}
    options |= {"min_size": min(size), "max_size": max(size), "depth": 18 if small else 50}
    if device == "cpu":
        options["box_batch_size_per_image"] = PROPOSALS_ON_CPU
    if kind == "panoptic_fpn":
        model = panoptic_fpn_resnet(**(quick.panoptic_fpn() if small else {}) | options)
    else:
        model = fasterrcnn_resnet_fpn(**(quick.faster_rcnn() if small else {}) | options)
    batch = [{k: v.to(device) for k, v in target.items()} for target in _targets(size)]
    images = [target.pop("image").float() / 255 for target in batch]
    return model.to(device), (images, batch), (images[:1],)


def detectron2_model(kind, norm, standardized, size, device, small):
    """As :func:`torchvision_model`."""
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances

    from gnpractical.d2 import load_config

    of_heads = "" if norm == "FrozenBN" else norm
    options = ["MODEL.DEVICE", device, "INPUT.MASK_FORMAT", "bitmask"]
    options += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]  # which also takes FrozenBN
    options += ["MODEL.RESNETS.DEPTH", "18" if small else "50", "MODEL.RESNETS.NORM", norm]
    if small:
        options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32"]
        options += ["MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]
        options += ["MODEL.ROI_BOX_HEAD.FC_DIM", "64"]
    if device == "cpu":
        options += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(PROPOSALS_ON_CPU)]
    for section in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD"):
        options += [f"MODEL.{section}.NORM", of_heads]
    parts = ["backbone", "roi_heads.box_head"] if standardized else []
    options += ["MODEL.GNP.WEIGHT_STANDARDIZATION", str(parts)]
    name = {"panoptic_fpn": "pfpn_gnp_full", "faster_rcnn": "faster_rcnn_gnp_ws"}[kind]
    batch = []
    for target in _targets(size):
        instances = Instances(size, gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"])
        instances.gt_masks = BitMasks(target["masks"])
        batch.append({"image": target["image"], "instances": instances})
        batch[-1]["sem_seg"] = target["semantic"]
    return build_model(load_config(f"configs/{name}.yaml", options)), (batch,), (batch[:1],)


class Variant:
    """A model that is trained step by step."""

    def __init__(self, framework, kind, norm, dtype, channels_last, size, device, small):
        torch.manual_seed(0)
        build = {"torchvision": torchvision_model, "detectron2": detectron2_model}[framework]
        before = self._memory(device)
        norm, _, standardized = norm.partition("+")
        model, self.batch, self.image = build(kind, norm, bool(standardized), size, device, small)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model, self.device = model, device
        self.precision = getattr(torch, dtype)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
        for _ in range(2):
            self.step()
        self.memory = None
        if device == "cuda":
            self.memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.times, self.inference_times = [], []

    @staticmethod
    def _memory(device):
        if device == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.precision)

    def step(self):
        self.model.train()
        self.optimizer.zero_grad()
        with self._autocast():
            losses = self.model(*self.batch)
        sum(losses.values()).backward()
        self.optimizer.step()

    def infer(self):
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            self.model(*self.image)

    def share_of_norms(self):
        """That of the time of all operations of a step, or None where norms are none."""
        on_gpu = self.device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            self.step()
        events = profiler.key_averages()
        norms = [
            event
            for event in events
            if event.key.removeprefix("aten::").removesuffix("_backward") in _NORM_OPERATIONS
        ]
        if on_gpu:  # kernels are events of their own, and the operations know theirs
            kernels = [e for e in events if e.device_type == DeviceType.CUDA]
            total = sum(e.self_device_time_total for e in kernels if not e.is_user_annotation)
            of_norms = sum(event.device_time_total for event in norms)
        else:
            total = sum(event.self_cpu_time_total for event in events)
            of_norms = sum(event.cpu_time_total for event in norms)
        return of_norms / total if of_norms else None


def timed(function, device):
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def event_storage(framework):
    """What Detectron2's models log to."""
    if framework != "detectron2":
        return nullcontext()
    from detectron2.utils.events import EventStorage

    return EventStorage()


def measure(framework, kind, norms, size, device, steps, settings=CPU_SETTINGS, small=False):
    """A dict for each variant."""
    variants = {}
    with event_storage(framework):
        for norm, setting in itertools.product(norms, settings):
            variants[(norm, *setting)] = Variant(
                framework, kind, norm, *setting, size, device, small
            )
        order = list(variants.values())
        for _ in range(steps):
            random.shuffle(order)  # the one before leaves memory to be mapped again
            for variant in order:
                variant.times.append(timed(variant.step, device))
                variant.inference_times.append(timed(variant.infer, device))
        return [
            _row(framework, kind, case, variant, variants[("GN", case[1], False)])
            for case, variant in variants.items()
        ]


def _row(framework, kind, case, variant, reference):
    ratios = [a / b for a, b in zip(variant.times, reference.times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    norm, dtype, channels_last = case
    on_gpu = variant.device == "cuda"  # where taking the profile takes seconds
    return {
        "model": f"{framework} {kind}",
        "norm": norm,
        "dtype": dtype,
        "layout": "nhwc" if channels_last else "nchw",
        "steps": len(ratios),
        "seconds": statistics.median(variant.times),
        "ratio": middle,
        "25%": low,
        "75%": high,
        "norms": None if on_gpu and dtype == "float32" else variant.share_of_norms(),
        "MiB": variant.memory,
        "inference": statistics.median(variant.inference_times),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    add("--models", nargs="+", choices=KINDS, default=KINDS)
    add("--steps", type=int, default=15)
    add("--size", type=int, help="side of square images, pixels; default: 128, on a GPU 800x1333")
    args = parser.parse_args()
    size = (args.size, args.size) if args.size else LARGE if device == "cuda" else (128, 128)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"torch {torch.__version__}, {name or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    for framework, kind in itertools.product(args.frameworks, args.models):
        settings = GPU_SETTINGS if device == "cuda" else CPU_SETTINGS
        rows = measure(framework, kind, NORMS, size, device, args.steps, settings)
        print(tabulate(rows, "keys", floatfmt=FLOATS), flush=True)


if __name__ == "__main__":
    main()
