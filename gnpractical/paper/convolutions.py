"""The exact law on convolutions: K measured by autograd beside what the law says, and the paper.

A trial draws new weights and images. White noise runs through some blocks (3x3 convolution,
GroupNorm of 8 channels a group, ReLU), which is where channels get means that differ; then through
the block that is looked at. The gradient at its output is white noise, as the derivation assumes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.measure.features import feature_statistics
from gnpractical.measure.gradient_isometry import measure_gradient_variance
from gnpractical.num_groups import check_width

IMAGES, SIZE, PER_GROUP = 8, 16, 8


@dataclass(frozen=True)
class Setting:
    """A layer: its widths, what it is like, and how many blocks stand in front of it."""

    in_channels: int = 128
    out_channels: int = 128
    kernel: int = 3
    stride: int = 1
    depth: int = 3
    padding: str = "circular"


SETTINGS = (
    Setting(),
    Setting(256, 128),
    Setting(256, 64, kernel=1),
    Setting(64, 256, kernel=1),
    Setting(kernel=5),
    Setting(stride=2),
    Setting(depth=0),
    Setting(depth=1),
    Setting(depth=8),
    Setting(padding="zeros"),
    Setting(stride=2, padding="zeros"),
)


@dataclass(frozen=True)
class ConvolutionRatio:
    """K of one setting at one number of channels to a group.

    Attributes:
        setting, channels_per_group: What was looked at.
        mean_share: rho in front of the norm, in the mean over the trials.
        measured, standard_error: K, in the mean over the trials, and its error.
        law: K by the exact law from forward passes, in the mean over the trials.
        paper: K by Eq. (31).
    """

    setting: Setting
    channels_per_group: int
    mean_share: float
    measured: float
    standard_error: float
    law: float
    paper: float


def simulate_convolutions(
    setting: Setting, trials: int = 16, seed: int = 0
) -> list[ConvolutionRatio]:
    """Measure K from one channel to a group to all of them, on the same draws.

    Raises:
        ValueError: Fewer than two trials, which leave no standard error.
    """
    check_width("trials", trials)
    if trials < 2:
        raise ValueError(f"trials must be at least 2, for a standard error; got {trials}")
    torch.manual_seed(seed)
    width = setting.out_channels
    seen: dict[int, list[tuple[float, ...]]] = {n: [] for n in (1, 2, 4, 8, 32, width)}
    for _ in range(trials):
        x = _features(setting)
        layer = _convolution(setting, width, setting.kernel, setting.stride)
        noise = torch.randn_like(layer(x))

        def loss(model: nn.Module, x: Tensor, noise: Tensor = noise) -> Tensor:
            return (model(x) * noise).sum()

        for per_group, ratios in seen.items():
            model = nn.Sequential(layer, nn.GroupNorm(width // per_group, width), nn.ReLU())
            (block,) = feature_statistics(model, [x])
            (measured,) = measure_gradient_variance(model, [x], loss)
            ratios.append((block.mean_share, measured.ratio, block.gradient_variance_ratio()))  # type: ignore[arg-type]
    rows = []
    for per_group, ratios in seen.items():
        shares, measurements, laws = zip(*ratios, strict=True)
        paper = gradient_variance_ratio(setting.in_channels, width, width // per_group)
        error = stdev(measurements) / math.sqrt(trials)
        values = fmean(shares), fmean(measurements), error, fmean(laws), paper
        rows.append(ConvolutionRatio(setting, per_group, *values))
    return rows


def _features(setting: Setting) -> Tensor:
    """Images, or what some random blocks make of them."""
    width = setting.in_channels
    x = torch.randn(IMAGES, width, SIZE, SIZE)
    with torch.no_grad():
        for _ in range(setting.depth):
            x = _convolution(setting, width, 3, 1)(x)
            x = torch.group_norm(x, width // PER_GROUP).relu()
    return x


def _convolution(setting: Setting, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(
        setting.in_channels,
        out_channels,
        kernel,
        stride,
        kernel // 2,
        bias=False,
        padding_mode=setting.padding,  # type: ignore[arg-type]
    )
    nn.init.kaiming_normal_(conv.weight)
    return conv
