#!/usr/bin/env python
"""A training step of the small Panoptic FPN in Detectron2 and on torchvision, interleaved.

    python benchmarks/frameworks.py [--steps 40]

The models of configs/quick and of train_torchvision.py --quick, on the embedded shapes, each with
its own data loader (in the training process) and clipped SGD, from the same number of images a
step. Medians, and the quartiles of the ratio over the steps.
"""

import argparse
import statistics
import time

import detectron2
import torch
import torchvision
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from torch.utils.data import DataLoader

from gnpractical.d2 import load_config
from gnpractical.datasets.coco_files import datasets_root
from gnpractical.tv import panoptic_fpn_resnet, quick
from gnpractical.tv.datasets import collate, open_split


def detectron2_side():
    cfg = load_config("configs/quick/pfpn_gnp_shapes.yaml", ["MODEL.DEVICE", "cpu"])
    model = DefaultTrainer.build_model(cfg).train()
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    batches = iter(build_detection_train_loader(cfg))

    def step():
        loss = sum(model(next(batches)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # clips, as the config says

    return model, step


def torchvision_side():
    dataset = open_split(datasets_root(), "gnp_shapes", "train", panoptic=True, check=False)
    model = panoptic_fpn_resnet(
        depth=18, num_things=4, num_stuff=4, min_size=120, **quick.panoptic_fpn()
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), quick.OPTIONS["lr"] / 1000, 0.9)
    loader = DataLoader(dataset, 2, shuffle=True, drop_last=True, collate_fn=collate)
    batches = (batch for _ in range(1000) for batch in loader)

    def step():
        loss = sum(model(*next(batches)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), quick.OPTIONS["clip_grad_norm"])
        optimizer.step()

    return model, step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    sides = {"detectron2": detectron2_side(), "torchvision": torchvision_side()}
    times = {name: [] for name in sides}
    with EventStorage():
        for i in range(args.steps + 3):
            for name, (_, step) in sides.items():
                start = time.perf_counter()
                step()
                if i >= 3:
                    times[name].append(time.perf_counter() - start)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"detectron2 {detectron2.__version__}, {torch.get_num_threads()} threads"
    )
    for name, (model, _) in sides.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: median {statistics.median(times[name]):.4f} s, {parameters} parameters")
    ratios = [t / d for d, t in zip(times["detectron2"], times["torchvision"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"torchvision / detectron2: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
