#!/usr/bin/env python
"""GroupNorm by number of groups, memory layout, type and implementation, in one run.

    python benchmarks/group_norm.py [--maps small|large|tiny] [--rounds 5] [--triton FILE]

Maps are those of a ResNet-50-FPN and of RoI heads at 2 images; by default small ones for a CPU, and
on a GPU those of 800x1333 pixels. G is 1, 32, the practical number for a layer that narrows four
times, C/16, C/4 and C; layers that widen or keep their width have 1.

`torch` is F.group_norm, which PracticalGroupNorm runs; `autocast` is how mixed precision calls it,
in float32; `compiled` is the same through torch.compile (on a GPU, for two of the maps); `split`
takes the moments by torch.var_mean, which splits long sums over a whole GPU; `triton` is in a file
that is given, such as the kernels that this project once had:

    git show 725d1aa:gnpractical/layers/triton_group_norm.py > FILE

`bn` is batch norm in training. On a GPU every case is a CUDA graph over as many different maps as
the cache cannot hold, so that neither launches nor the cache are timed. Shares are of the bandwidth
of a copy of the same maps: a norm reads its input twice and writes it once, and backward reads two
maps twice and writes one, 3 and 8 passes with forward. `over_32` is the time of both over that of
`torch` at 32 groups in the same layout, and `error` the largest distance of the output and the
input's gradient from float64, as a share of their largest value. All are medians over the rounds.
"""

import argparse
import importlib.util
import itertools
import math
import platform
import statistics
from collections import defaultdict

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.utils.benchmark import Timer

from gnpractical import practical_num_groups

MAPS = {
    "tiny": [(2, 32, 8, 8)],
    "small": [(2, 64, 128, 128), (2, 256, 64, 64), (2, 2048, 8, 8), (128, 256, 7, 7)],
    "large": [
        *((2, 64, 400, 672), (2, 256, 200, 336), (2, 512, 100, 168), (2, 1024, 50, 84)),
        *((2, 2048, 25, 42), (1024, 256, 7, 7)),
    ],
}
COMPILED = MAPS["large"][1:3]  # each takes seconds to compile
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ROTATED_BYTES = 2**28  # of different maps, more than a GPU's cache holds
PASSES = (3, 8)  # over the map, forward and with backward; a copy makes 2
DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*5 * ("",), ".1f", ".2f", ".1f", ".2f", ".2f", ".0e")  # of the columns


class Split(torch.autograd.Function):
    """GroupNorm whose moments are sums that PyTorch splits over many thread blocks."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias):
        variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), (2, 3, 4), correction=0)
        rstd = (variance + 1e-5).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        size = x.shape[1] // groups
        scale = weight * rstd.repeat_interleave(size, 1)
        shift = bias - mean.repeat_interleave(size, 1) * scale
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None])

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        n, channels, height, width = x.shape
        sizes = (n, channels, height * width, mean.shape[1])
        gradients = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, weight, *sizes, [True] * 3
        )
        return gradients[0], None, *gradients[1:]


def triton_norm(path):
    """The kernels in a file, as a function like F.group_norm."""
    spec = importlib.util.spec_from_file_location("triton_group_norm", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)

    class Triton(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, groups, weight, bias):
            y = torch.empty_like(x)
            moments = kernels.forward(x.flatten(2), groups, weight, bias, 1e-5, False, y.flatten(2))
            ctx.save_for_backward(x, weight, bias, *moments)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, weight, bias, *moments = ctx.saved_tensors
            affine = (weight, bias)
            found = kernels.backward(grad.flatten(2), x.flatten(2), *moments, *affine, False)
            return found[0].view_as(x), None, *(g.to(weight.dtype) for g in found[1:])

    return Triton.apply


def implementations(shape, groups, dtype, device, triton):
    """Functions (x, groups, weight, bias) -> y."""

    def autocast(*args):
        with torch.autocast(device, dtype=dtype):
            return F.group_norm(*args)

    found = {"torch": F.group_norm, "split": Split.apply}
    if dtype != torch.float32:
        found["autocast"] = autocast
    if device == "cuda" and shape in COMPILED and groups in (1, 32):
        torch.compiler.reset()  # else PyTorch stops compiling after a few shapes
        found["compiled"] = torch.compile(lambda *args: F.group_norm(*args), dynamic=False)
    return found | ({"triton": triton} if triton else {})


def cases(shape, dtype, device, triton):
    """(groups, name, norm) of each; the norm is a function (x, groups, weight, bias) -> y."""
    channels = shape[1]
    yield 0, "copy", lambda x, *_: x.clone()
    yield channels, "bn", lambda x, _, w, b: F.batch_norm(x, None, None, w, b, training=True)
    practical = practical_num_groups(4 * channels, channels)
    for groups in sorted({1, 32, practical, channels // 16, channels // 4, channels}):
        for name, norm in implementations(shape, groups, dtype, device, triton).items():
            yield groups, name, norm


def seconds(function, inputs, device, min_seconds):
    """Median time of ``function`` of one of the inputs."""

    def run():
        for each in inputs:
            function(*each)

    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles and tunes
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_seconds).median / len(inputs)


def error(norm, x, grad, groups):
    """The largest from float64's, of the output and the input's gradient."""
    weight, bias = (torch.linspace(low, 1, x.shape[1], device=x.device) for low in (0.5, -1))
    results = []
    for function, dtype in ((norm, x.dtype), (F.group_norm, torch.float64)):
        each = x.detach().to(dtype).requires_grad_()
        y = function(each, groups, weight.to(dtype), bias.to(dtype))
        results.append((y.detach(), *torch.autograd.grad(y, each, grad.to(y.dtype))))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def measure(maps, device, dtypes, rounds, min_seconds, triton=None):
    """Rows of dicts: a case, and its medians over the rounds, in which the cases come in turn."""
    triton = triton_norm(triton) if triton else None
    times, errors = defaultdict(lambda: ([], [])), {}
    # glibc gives freed blocks back to the system, to be mapped anew, until it has seen larger ones
    # come and go, as a training step's do; without this the order of the cases decides.
    torch.ones(31 << 18)
    for shape, _, dtype, layout in itertools.product(MAPS[maps], range(rounds), dtypes, LAYOUTS):
        inputs = []
        size = math.prod(shape) * dtype.itemsize
        for _ in range(min(16, math.ceil(ROTATED_BYTES / size)) if device == "cuda" else 1):
            both = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            x, grad = (each.to(memory_format=LAYOUTS[layout]) for each in both)
            inputs.append((x.requires_grad_(), grad))
        ones = (torch.ones(shape[1], device=device, dtype=dtype) for _ in range(2))
        affine = tuple(each.requires_grad_() for each in ones)
        for groups, name, norm in cases(shape, dtype, device, triton):

            def forward(x, grad, norm=norm, groups=groups, affine=affine):
                with torch.no_grad():
                    norm(x, groups, *affine)

            def both(x, grad, norm=norm, groups=groups, affine=affine):
                y = norm(x, groups, *affine)
                torch.autograd.grad(y, (x, *affine), grad.to(y.dtype), allow_unused=True)

            case = (shape, dtype, layout, groups, name)
            for passes, spent in zip((forward, both), times[case], strict=True):
                spent.append(seconds(passes, inputs, device, min_seconds))
            if case not in errors:
                is_group_norm = name not in ("copy", "bn")
                errors[case] = error(norm, *inputs[0], groups) if is_group_norm else None
    return [_row(case, times, errors[case]) for case in times]


def _row(case, times, worst):
    shape, dtype, layout, groups, name = case
    forward, both = times[case]
    (copy, _), (_, of_32) = times[(*case[:3], 0, "copy")], times[(*case[:3], 32, "torch")]
    shares = [
        passes / 2 * statistics.median(copy) / statistics.median(spent)
        for passes, spent in zip(PASSES, (forward, both), strict=True)
    ]
    return {
        "map": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "groups": groups or None,
        "norm": name,
        "forward_us": 1e6 * statistics.median(forward),
        "forward_share": shares[0],
        "both_us": 1e6 * statistics.median(both),
        "both_share": shares[1],
        "over_32": statistics.median(a / b for a, b in zip(both, of_32, strict=True)),
        "error": worst,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--maps", choices=MAPS, default="large" if device == "cuda" else "small")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=0.05, help="of each case in each round")
    add("--triton", metavar="FILE")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"torch {torch.__version__}, {name or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    dtypes = [getattr(torch, dtype) for dtype in args.dtype]
    rows = measure(args.maps, device, dtypes, args.rounds, args.seconds, args.triton)
    print(tabulate(rows, "keys", floatfmt=FLOATS))


if __name__ == "__main__":
    main()
