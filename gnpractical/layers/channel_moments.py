"""Mean and deviation of the channels of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, C), in float64, over the positions of every channel of x (N, C, *)."""
    images, channels = x.shape[:2]
    # Group norm's kernel computes them many times faster on a CPU than torch.var_mean does.
    eps = 1e-10
    args = (None, None, images, channels, x.numel() // (images * channels), channels, eps)
    _, means, rstds = torch.native_group_norm(x.float().contiguous(), *args)
    return means.double(), rstds.double() ** -2 - eps


class ChannelStatistics:
    """Mean and deviation of each channel over all tensors (N, C, *) that were added."""

    def __init__(self) -> None:
        self.count = 0
        self.mean, self._squares = torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        means, variances = channel_moments(x)
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        count = x.numel() // x.shape[1]
        total = self.count + count
        difference = mean - self.mean.to(mean)
        added = count * (variance + difference**2 * (self.count / total))
        self._squares = self._squares.to(mean) + added
        self.mean = self.mean.to(mean) + difference * (count / total)
        self.count = total

    @property
    def deviation(self) -> Tensor:
        return (self._squares / self.count).clamp(min=0).sqrt()
