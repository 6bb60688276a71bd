#!/usr/bin/env python
"""Seconds a trial of the gradient simulation, against a plain loop of single-sample experiments.

    python benchmarks/simulation_speed.py [--plain-trials 30]

Both measure the same quantities with autograd, in turn, at each of the paper's four settings.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from gnpractical.paper.simulation import PAPER_ROWS, TRIALS_PER_DRAW, simulate


def plain_trial(in_channels, out_channels, num_groups):
    x0 = torch.randn(1, in_channels)
    x = F.relu(F.group_norm(x0 @ torch.randn(in_channels, in_channels), num_groups))
    x.requires_grad_()
    y = x @ torch.randn(in_channels, out_channels)
    z = F.group_norm(y, num_groups)
    out = F.relu(z)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, y, z, out])
    return [g.var(correction=0).item() for g in gradients], y.var(correction=0).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain-trials", type=int, default=30)
    plain_trials = parser.parse_args().plain_trials
    totals = {"plain": 0.0, "vectorized": 0.0}
    for setting in PAPER_ROWS:
        plain_trial(*setting)
        start = time.perf_counter()
        for _ in range(plain_trials):
            plain_trial(*setting)
        plain = (time.perf_counter() - start) / plain_trials
        start = time.perf_counter()
        simulate(*setting, trials=8 * TRIALS_PER_DRAW)
        vectorized = (time.perf_counter() - start) / (8 * TRIALS_PER_DRAW)
        totals["plain"] += plain
        totals["vectorized"] += vectorized
        print(
            f"{setting}: plain {plain * 1e3:.3f} ms a trial, vectorized "
            f"{vectorized * 1e3:.4f} ms, {plain / vectorized:.0f} times faster"
        )
    faster = totals["plain"] / totals["vectorized"]
    print(
        f"all four: {faster:.0f} times faster; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
