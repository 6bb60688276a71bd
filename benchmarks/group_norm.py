#!/usr/bin/env python
"""GroupNorm forward and backward by number of groups, memory layout and implementation, in one run.

    python benchmarks/group_norm.py [--repeats 15] [--large] [--dtype float32|bfloat16|float16]

Maps of a ResNet-FPN and of RoI heads at 2 images: small ones for a CPU, with --large those of
800x1333 pixels. G is 1, 32, the practical number for a layer as wide as its input and for one that
narrows four times (1 and C/4 or so), and C. `torch` is F.group_norm, which PracticalGroupNorm runs,
and on a GPU `compiled` is the same through torch.compile. `bn` is batch norm in training, `timm`
timm's GroupNorm and LayerNorm2d, `copy` a multiplication out of place, whose memory traffic bounds
every norm. A dtype other than float32 runs under autocast. Times are medians of runs of three, the
cases' runs in turn; ratios are to F.group_norm at 32 groups, contiguous, and to the same G,
contiguous.
"""

import argparse
import platform
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from tabulate import tabulate

from gnpractical import practical_num_groups

SMALL = [(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 16, 16), (2, 2048, 8, 8), (128, 256, 7, 7)]
LARGE = [
    (2, 64, 400, 672),
    (2, 256, 200, 336),
    (2, 512, 100, 168),
    (2, 2048, 25, 42),
    (1024, 256, 7, 7),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def timm_norms(channels, device):
    try:
        from timm.layers import GroupNorm, LayerNorm2d
    except ImportError:
        return
    for norm in (GroupNorm(channels, num_groups=32), LayerNorm2d(channels)):
        yield f"timm {type(norm).__name__}", norm.to(device)


def cases(shape, device, dtype):
    """(name, function, input, gradient, parameters) of each case."""
    channels = shape[1]
    weight = torch.ones(channels, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)
    compiled = torch.compile(F.group_norm) if device == "cuda" else None
    narrowing = practical_num_groups(4 * channels, channels)
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
        x.requires_grad_()
        grad = torch.randn(shape, device=device).to(memory_format=memory_format)
        for groups in sorted({1, 32, channels // 8, channels // 4, narrowing, channels}):
            functions = {"torch": F.group_norm} | ({"compiled": compiled} if compiled else {})
            for name, function in functions.items():
                yield (
                    f"{layout} G={groups} {name}",
                    lambda x, f=function, g=groups: f(x, g, weight, bias),
                    x,
                    grad,
                    (weight, bias),
                )

        def batch_norm(x):
            return F.batch_norm(x, None, None, weight, bias, training=True)

        yield f"{layout} bn", batch_norm, x, grad, (weight, bias)
        for name, norm in timm_norms(channels, device):
            yield f"{layout} {name}", norm, x, grad, tuple(norm.parameters())
        yield f"{layout} copy", lambda x: x * 1.5, x, grad, ()


def timed(function, x, grad, parameters):
    run = []
    for _ in range(3):
        autocast = x.dtype != torch.float32
        start = time.perf_counter()
        with torch.autocast(x.device.type, dtype=x.dtype) if autocast else nullcontext():
            y = function(x)
        y.backward(grad.to(y.dtype) if autocast else grad)
        if x.is_cuda:
            torch.cuda.synchronize()
        run.append(time.perf_counter() - start)
        for tensor in (x, *parameters):
            tensor.grad = None
    return statistics.median(run)


def quartiles(values, others):
    return statistics.quantiles([a / b for a, b in zip(values, others, strict=True)], n=4)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # glibc gives freed blocks back to the system, to be mapped anew, until it has seen larger ones
    # come and go, as a training step's do; without this the order of the cases decides.
    torch.ones(31 << 18)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"torch {torch.__version__}, {name or platform.machine()}, "
        f"{torch.get_num_threads()} threads, {args.dtype}"
    )
    for shape in LARGE if args.large else SMALL:
        all_cases = list(cases(shape, device, getattr(torch, args.dtype)))
        times = {case[0]: [] for case in all_cases}
        for i in range(args.repeats + 2):
            for case, function, x, grad, parameters in all_cases:
                seconds = timed(function, x, grad, parameters)
                if i >= 2:
                    times[case].append(seconds)
        rows = []
        for case, values in times.items():
            low, middle, high = quartiles(values, times["nchw G=32 torch"])
            same = times.get(f"nchw {case.split()[1]} torch")
            rows.append(
                [
                    case,
                    middle,
                    low,
                    high,
                    quartiles(values, same)[1] if same else None,
                    1e3 * statistics.median(values),
                ]
            )
        print("x".join(map(str, shape)))
        headers = ["", "to 32 nchw", "25%", "75%", "to same nchw", "ms"]
        print(tabulate(rows, headers, floatfmt=".2f"), flush=True)


if __name__ == "__main__":
    main()
