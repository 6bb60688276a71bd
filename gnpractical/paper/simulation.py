"""Eqs. A to D of the paper, measured by autograd on random unit blocks (its Table 1).

Source: Sec. 2.2 of "On the Ideal Number of Groups for Isometric Gradient Propagation",
arXiv 2302.03193. Symbols: x, y, z, x' are a block's input, its weight layer's output, the
normalized features and the block's output; n_in -> in_channels, n_out -> out_channels,
G -> num_groups, n_g = n_out / G, W the weights (unit variance), F = B = 1/2 the gains of ReLU.

A trial, as in the paper: two blocks with new Gaussian weights, a new Gaussian input, and the
variances at the second block's ends, over its features. Two things differ:

* The loss weighs the outputs by random normal numbers. With the paper's plain sum the gradient at
  the output is constant, its variance is 0, and C and D are undefined.
* A block of ``TRIALS_PER_DRAW`` trials shares the two weight matrices, each row of which gets new
  random signs in every trial. A Gaussian matrix with random signs is a Gaussian matrix, so every
  single trial is exactly the paper's; and two trials' features are uncorrelated. What is left of
  their dependence (through the weights' magnitudes) is covered by taking standard errors over
  the draws, which are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.num_groups import check_num_groups, check_width

# Table 1's settings (n_in, n_out, G); then one width with 4 to 512 channels per group.
PAPER_ROWS = ((1024, 512, 128), (512, 256, 64), (256, 128, 32), (128, 64, 16))
SWEEP_ROWS = tuple((1024, 512, 512 // n_g) for n_g in (4, 8, 16, 32, 64, 128, 256, 512))
EQUATIONS = ("A", "B", "B_layer", "C", "D")
TRIALS_PER_DRAW = 250


@dataclass(frozen=True)
class Isometry:
    """One equation measured at one setting.

    Attributes:
        in_channels, out_channels, num_groups: n_in, n_out, G.
        equation: "A" is Var[dL/dx] / Var[dL/dy]. "B" is Var[y] Var[dL/dy] / Var[dL/dz], where
            Var[y] is over the weights, as in the derivation (Eq. 27). "B_layer" takes Var[y] over
            the trial's own features, as the paper measured it, by which 3 of n_out degrees of
            freedom go missing. "C" is Var[dL/dz] / Var[dL/dx'], "D" is Var[dL/dx] / Var[dL/dx'].
        measured, standard_error: The mean over the trials, and its error. At 5 or fewer channels
            per group the variance of B and D is infinite (E[1/sigma^4] diverges), and the standard
            error, finite for any one sample, understates.
        paper, exact: What Eq. (22) and the exact law of ``gradient_law`` predict.
    """

    in_channels: int
    out_channels: int
    num_groups: int
    equation: str
    measured: float
    standard_error: float
    paper: float
    exact: float

    @property
    def channels_per_group(self) -> int:
        return self.out_channels // self.num_groups


def simulate(
    in_channels: int,
    out_channels: int,
    num_groups: int,
    trials: int = 100_000,
    seed: int = 0,
) -> list[Isometry]:
    """Measure all equations at one setting.

    Args:
        trials: Is rounded up to a multiple of ``TRIALS_PER_DRAW``, and to at least two of these.

    Raises:
        ValueError: ``num_groups`` does not divide both widths or leaves fewer than 2 channels to
            a group, or ``trials`` is below 1.
    """
    check_num_groups(num_groups, out_channels)
    check_num_groups(num_groups, in_channels)
    check_width("trials", trials)
    if out_channels == num_groups:
        raise ValueError(f"{num_groups} groups leave one channel to a group: gradients are 0 there")
    generator = torch.Generator().manual_seed(seed)
    draws = max(2, math.ceil(trials / TRIALS_PER_DRAW))
    setting = in_channels, out_channels, num_groups
    means = torch.stack([_draw(*setting, generator) for _ in range(draws)])
    error, mean = torch.std_mean(means, dim=0)
    measured = zip(EQUATIONS, mean.tolist(), (error / math.sqrt(draws)).tolist(), strict=True)
    paper, exact = (_predictions(*setting, law) for law in ("paper", "exact"))
    return [
        Isometry(*setting, equation, value, spread, paper[equation], exact[equation])
        for equation, value, spread in measured
    ]


def _draw(
    in_channels: int, out_channels: int, num_groups: int, generator: torch.Generator
) -> Tensor:
    """Return the means of the EQUATIONS over the trials of one draw of the weights, in float64."""
    normal = partial(torch.randn, generator=generator)
    # A normal input's own signs are random already.
    y = normal(TRIALS_PER_DRAW, in_channels) @ normal(in_channels, in_channels)
    x = F.relu(F.group_norm(y, num_groups)).requires_grad_()
    signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
    y = (x * signs) @ normal(in_channels, out_channels)
    z = F.group_norm(y, num_groups)
    out = F.relu(z)
    loss = (out * normal(*out.shape)).sum()  # trials do not mix, so each gets its own gradient
    d_x, d_y, d_z, d_out = (
        gradient.double().var(dim=1, correction=0)
        for gradient in torch.autograd.grad(loss, [x, y, z, out])
    )
    y_variance = x.detach().double().square().sum(dim=1)  # W has unit variance
    layer_variance = y.detach().double().var(dim=1, correction=0)
    b = d_y / d_z
    ratios = (d_x / d_y, y_variance * b, layer_variance * b, d_z / d_out, d_x / d_out)
    return torch.stack([ratio.mean() for ratio in ratios])


def _predictions(
    in_channels: int, out_channels: int, num_groups: int, law: str
) -> dict[str, float]:
    d = gradient_variance_ratio(in_channels, out_channels, num_groups, law)
    b = d * in_channels / out_channels
    # The exact law counts the degrees of freedom that B_layer's Var[y] lacks; the paper's does not.
    share = 1.0 if law == "paper" else (out_channels - 3) / out_channels
    return {"A": out_channels, "B": b, "B_layer": b * share, "C": 0.5, "D": d}
