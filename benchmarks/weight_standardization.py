#!/usr/bin/env python
"""What weight standardization adds to a forward and backward pass of the weight, by its form.

    python benchmarks/weight_standardization.py [--repeats 30]

In the place of the convolution, which would hide it, stands a dot product, and its time with the
plain weight is taken off. `batch_norm`: the filters as channels of F.batch_norm, timm's StdConv2d,
which has the biased deviation and eps under the root. `reference`: mean, std and a division, the
authors' form. `ours`: standardize_weight. All in one run, in every order; ratios are to batch_norm:
medians and quartiles.
"""

import argparse
import itertools
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from gnpractical.layers.weight_standardization import standardize_weight

SHAPES = [(256, 256, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1)]


def batch_norm(weight):
    rows = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).view_as(weight)


def reference(weight):
    centered = weight - weight.mean((1, 2, 3), keepdim=True)
    std = centered.flatten(1).std(1) + 1e-5
    return centered / std.view(-1, 1, 1, 1)


def times_of(forms, weight, repeats):
    """Medians of runs of ten, the forms' runs in every order.

    One call after another's form would measure what memory the other left to be mapped again.
    """
    times = {name: [] for name in forms}
    direction = torch.randn_like(weight).flatten()
    orders = itertools.cycle(itertools.permutations(forms))
    for _ in range(repeats):
        for name in next(orders):
            run = []
            for _ in range(12):
                with torch.no_grad():
                    weight.add_(0)  # an optimizer's step: the weight has changed
                start = time.perf_counter()
                torch.dot(forms[name](weight).flatten(), direction).backward()
                if weight.is_cuda:
                    torch.cuda.synchronize()
                run.append(time.perf_counter() - start)
                weight.grad = None
            times[name].append(statistics.median(run[2:]))
    return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"torch {torch.__version__}, {name or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    for shape in SHAPES:
        weight = torch.nn.Parameter(0.05 * torch.randn(shape, device=device))
        forms = {
            "plain": lambda weight: weight,
            "batch_norm": batch_norm,
            "reference": reference,
            "ours": standardize_weight,
        }
        times = times_of(forms, weight, args.repeats)
        plain = times.pop("plain")
        added = {
            form: [a - b for a, b in zip(values, plain, strict=True)]
            for form, values in times.items()
        }
        print(f"{'x'.join(map(str, shape))}: plain {1e3 * statistics.median(plain):.2f} ms")
        for form, values in added.items():
            ratios = [a / b for a, b in zip(values, added["batch_norm"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"  {form}: ratio {middle:.2f} ({low:.2f} to {high:.2f}), adds "
                f"{1e3 * statistics.median(values):.2f} ms"
            )


if __name__ == "__main__":
    main()
