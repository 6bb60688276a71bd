"""GroupNorm on a CPU in whole-tensor operations, each of which is vectorized for any group size.

PyTorch's kernel for channels_last maps has vector instructions along the channels of a group only,
and none are left where these are fewer than 8. Here sums are taken per channel, joined to groups,
and go back to the channels as one scale and one shift.

Tensors are (N, C, P) with P positions, of any strides, the same for all tensors of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of ``x`` (N, C, P), none of them 0, into ``out`` of its strides and dtype.

    Returns:
        Mean and inverse deviation of every group, (N, num_groups), in float32 for half precision.
    """
    wide = _widened(x)
    y = out if out.dtype == wide.dtype else torch.empty_like(wide)
    mean = _group_means(wide.mean(2), num_groups)
    m = _of_channels(mean, wide)
    torch.sub(wide, m, out=y)
    variance = _group_means(torch.square(y, out=y).mean(2), num_groups)
    rstd = (variance + eps).rsqrt_()
    scale = _of_channels(rstd, wide) * weight[:, None]
    torch.addcmul(torch.addcmul(bias[:, None], m, scale, value=-1), wide, scale, out=y)
    if relu:
        y.relu_()
    if y is not out:
        out.copy_(y)
    return mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: of x, and of weight and bias in the dtype of ``mean``.

    Args:
        grad: dL/dy, (N, C, P) in the strides of ``x``.
    """
    num_groups = mean.shape[1]
    wide, g = _widened(x), _widened(grad)
    m, r = _of_channels(mean, wide), _of_channels(rstd, wide)
    scale = r * weight[:, None]
    if relu:
        g = g * (torch.addcmul(bias[:, None] - m * scale, wide, scale) > 0)
    memory = wide * g
    sums = g.sum(2, keepdim=True)
    sums_x = memory.sum(2, keepdim=True).addcmul_(m, sums, value=-1).mul_(r)  # g (x - mean) rstd
    # dL/dx = scale g - rstd (S + S_x (x - mean) rstd), S and S_x means over a group of weight g
    # and of weight g (x - mean) rstd: linear in g and in x.
    both = torch.stack([sums, sums_x]).mul_(weight[:, None] / x.shape[2]).squeeze(3)
    s, s_x = (_of_channels(_group_means(each, num_groups), wide) for each in both)
    slope = (r * r).mul_(s_x).neg_()
    torch.addcmul((r * s).addcmul_(m, slope).neg_(), wide, slope, out=memory)
    memory.addcmul_(g, scale)
    return memory.to(x.dtype), sums_x.sum((0, 2)), sums.sum((0, 2))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _group_means(channels: Tensor, num_groups: int) -> Tensor:
    if num_groups == channels.shape[1]:
        return channels
    return channels.view(len(channels), num_groups, -1).mean(2)


def _of_channels(groups: Tensor, x: Tensor) -> Tensor:
    """(N, num_groups) to (N, C, 1)."""
    n, channels, _ = x.shape
    if groups.shape[1] == channels:
        return groups[:, :, None]
    return groups[:, :, None].expand(-1, -1, channels // groups.shape[1]).reshape(n, channels, 1)
