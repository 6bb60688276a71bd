#!/usr/bin/env python
"""What weight standardization costs at inference, before and after folding it into the weights.

    python benchmarks/folding.py [--repeats 120] [--batch 1] [--size 224]

torchvision's ResNet-50, converted: `plain` without weight standardization, `unfolded` and `folded`
with it. The three are interleaved in one run; medians, and the quartiles of the ratios.
"""

import argparse
import copy
import itertools
import platform
import statistics
import time

import torch
import torchvision

from gnpractical import convert, fold_weight_standardization


def models(example):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50().eval()
    plain = convert(resnet, example, rule="practical", inplace=False).model
    unfolded = convert(resnet, example, rule="practical", weight_standardization=True).model
    folded = copy.deepcopy(unfolded)
    fold_weight_standardization(folded)
    return {"plain": plain, "unfolded": unfolded, "folded": folded}


@torch.inference_mode()
def inference_times(runs, x, repeats):
    times = {name: [] for name in runs}
    orders = itertools.cycle(itertools.permutations(runs))  # each follows each equally often
    for i in range(repeats + 3):
        for name in next(orders):
            start = time.perf_counter()
            runs[name](x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=120)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(args.batch, 3, args.size, args.size)
    runs = {name: model.to(device) for name, model in models(x).items()}
    x = x.to(device)
    with torch.inference_mode():
        torch.testing.assert_close(runs["folded"](x), runs["unfolded"](x), rtol=1e-3, atol=1e-3)
    times = inference_times(runs, x, args.repeats)
    name = torch.cuda.get_device_name() if x.is_cuda else platform.processor()
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{name or platform.machine()}, {torch.get_num_threads()} threads"
    )
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.4f} s of {len(values)}")
    for name, base in (("folded", "plain"), ("folded", "unfolded"), ("unfolded", "plain")):
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name} / {base}: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
