#!/usr/bin/env python
"""GroupNorm forward and backward by number of groups and memory layout, in one run.

    python benchmarks/group_norm.py [--repeats 15] [--large]

Maps of a ResNet-FPN and of RoI heads at 2 images: small ones for a CPU, with --large those of
800x1333 pixels. G is 1, 32, C/4, C/2 and C; `bn` is batch norm in training, `copy` a
multiplication out of place. Times are medians of runs of three, the cases' runs in turn; ratios are
to 32 groups, contiguous.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate

SMALL = [(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 16, 16), (2, 2048, 8, 8), (128, 256, 7, 7)]
LARGE = [(2, 64, 400, 672), (2, 256, 200, 336), (2, 512, 100, 168), (2, 2048, 25, 42),
         (1024, 256, 7, 7)]  # fmt: skip


def cases(shape, device):
    channels = shape[1]
    weight = torch.ones(channels, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)
    parameters = (weight, bias)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape, device=device).to(memory_format=layout).requires_grad_()
        grad = torch.randn(shape, device=device).to(memory_format=layout)
        name = "nhwc" if layout is torch.channels_last else "nchw"
        for groups in sorted({1, 32, channels // 4, channels // 2, channels}):
            def group_norm(x, groups=groups):
                return F.group_norm(x, groups, weight, bias)

            yield f"{name} G={groups}", group_norm, x, grad, parameters

        def batch_norm(x):
            return F.batch_norm(x, None, None, weight, bias, training=True)

        yield f"{name} bn", batch_norm, x, grad, parameters
        yield f"{name} copy", lambda x: x * 1.5, x, grad, parameters


def timed(function, x, grad, parameters):
    run = []
    for _ in range(3):
        start = time.perf_counter()
        function(x).backward(grad)
        if x.is_cuda:
            torch.cuda.synchronize()
        run.append(time.perf_counter() - start)
        for tensor in (x, *parameters):
            tensor.grad = None
    return statistics.median(run)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"torch {torch.__version__}, {name or platform.machine()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for shape in LARGE if args.large else SMALL:
        all_cases = list(cases(shape, device))
        times = {case[0]: [] for case in all_cases}
        for i in range(args.repeats + 2):
            for case, function, x, grad, parameters in all_cases:
                seconds = timed(function, x, grad, parameters)
                if i >= 2:
                    times[case].append(seconds)
        rows = []
        for case, values in times.items():
            ratios = [a / b for a, b in zip(values, times["nchw G=32"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append([case, middle, low, high, 1e3 * statistics.median(values)])
        print("x".join(map(str, shape)))
        print(tabulate(rows, ["", "ratio", "25%", "75%", "ms"], floatfmt=".2f"), flush=True)


if __name__ == "__main__":
    main()
