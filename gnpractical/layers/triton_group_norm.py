"""GroupNorm on a GPU for any number of groups and both memory layouts, in Triton.

Detection has few large images: with one group a reduction over (image, group) keeps two of a GPU's
hundred multiprocessors busy. Here the sums are taken per channel over parts of the positions, as
many parts as fill the GPU, and joined afterwards; what remains is one elementwise pass. Statistics
are float32, joined from parts by their means and squared deviations (Chan, Golub and LeVeque 1983),
which loses nothing where the mean is far above the deviation.

Tensors are (N, C, P) with P positions, of any strides, the same for all tensors of one call. Needs
triton. Imported with TRITON_INTERPRET=1, the kernels run on a CPU.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PROGRAMS_A_PROCESSOR = 8  # parts of the sums, so that every multiprocessor has a few
_MIN_PART = 256  # positions
_JOINED = 1024  # at most, at once


def _configs() -> list[triton.Config]:
    if INTERPRETED:  # small, so that small tensors have several tiles and parts
        return [triton.Config({"BLOCK_C": 4, "BLOCK_P": 8})]
    return [
        triton.Config({"BLOCK_C": block_c, "BLOCK_P": block_p}, num_warps=warps)
        for block_c, block_p in [(1, 1024), (1, 4096), (4, 512), (32, 64), (64, 32), (128, 32)]
        for warps in (4, 8)
    ]


def _fit_the_layout(configs, named_args, **_):
    """Tiles that are long where the memory is contiguous."""
    channels_last = named_args["stride_c"] == 1
    return [c for c in configs if INTERPRETED or (c.kwargs["BLOCK_C"] > 4) == channels_last]


# By the channels, not the positions, which vary from batch to batch.
_autotune = triton.autotune(
    _configs(), key=["C", "stride_c_is_1"], prune_configs_by={"early_config_prune": _fit_the_layout}
)


@triton.jit
def _offsets(n, c, p, stride_n, stride_c, stride_p):
    return n * stride_n + c[:, None] * stride_c + p[None, :] * stride_p


@triton.jit
def _column(values, index, mask):
    return tl.load(values + index, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _part(C, P, part_length, parts, BLOCK_C: tl.constexpr):
    """Image, channels and positions of this program's part, and where its sums go."""
    n, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = part * part_length
    return n, c, start, tl.minimum(start + part_length, P), (n * parts + part) * C + c


@triton.jit
def _tile(
    C, P, D, stride_n, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Channels of this program's tile, their groups, and where its values are."""
    tiles = tl.cdiv(P, BLOCK_P)
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    where = _offsets(n, c, p, stride_n, stride_c, stride_p)
    return c, n * (C // D) + c // D, where, (c[:, None] < C) & (p[None, :] < P)


@_autotune
@triton.jit
def _moments_kernel(
    x, means, squares, C, P, part_length, parts, stride_n, stride_c, stride_p, stride_c_is_1,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over one part of one image."""
    n, c, start, end, out = _part(C, P, part_length, parts, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(start, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < end)
        value = tl.load(x + _offsets(n, c, p, stride_n, stride_c, stride_p), mask=mask, other=0.0)
        value = value.to(tl.float32)
        before = (first - start).to(tl.float32)
        here = tl.minimum(end - first, BLOCK_P).to(tl.float32)
        mean_here = tl.sum(value, 1) / here
        deviation = tl.where(mask, value - mean_here[:, None], 0.0)
        gap = mean_here - mean
        square += tl.sum(deviation * deviation, 1) + gap * gap * (before * here / (before + here))
        mean += gap * (here / (before + here))
    tl.store(means + out, mean, mask=c < C)
    tl.store(squares + out, square, mask=c < C)


@triton.jit
def _join_kernel(
    means, squares, mean, rstd, C, P, D, part_length, parts, values, eps, BLOCK: tl.constexpr
):
    """Mean and inverse deviation of one group, of D channels, of one image."""
    n, g = tl.program_id(0), tl.program_id(1)
    entries = parts * D
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, entries, BLOCK):
        i = first + tl.arange(0, BLOCK)
        where = (n * parts + i // D) * C + g * D + i % D
        count = tl.minimum(P - i // D * part_length, part_length).to(tl.float32)
        total += count * tl.load(means + where, mask=i < entries, other=0.0)
    group_mean = tl.sum(total, 0) / values
    square = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, entries, BLOCK):
        i = first + tl.arange(0, BLOCK)
        where = (n * parts + i // D) * C + g * D + i % D
        count = tl.minimum(P - i // D * part_length, part_length).to(tl.float32)
        gap = tl.load(means + where, mask=i < entries, other=0.0) - group_mean
        more = tl.load(squares + where, mask=i < entries, other=0.0) + count * gap * gap
        square += tl.where(i < entries, more, 0.0)
    out = n * tl.num_programs(1) + g
    tl.store(mean + out, group_mean)
    tl.store(rstd + out, 1.0 / tl.sqrt(tl.sum(square, 0) / values + eps))


@_autotune
@triton.jit
def _normalize_kernel(
    x, out, mean, rstd, weight, bias, C, P, D, stride_n, stride_c, stride_p, stride_c_is_1,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c, group, where, mask = _tile(C, P, D, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P)
    m = _column(mean, group, c < C)
    r = _column(rstd, group, c < C)
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    value = (value - m) * (r * _column(weight, c, c < C)) + _column(bias, c, c < C)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # keeps a NaN
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


@_autotune
@triton.jit
def _gradient_sums_kernel(
    grad, x, mean, rstd, weight, bias, sums, sums_x, C, P, D, part_length, parts,
    stride_n, stride_c, stride_p, stride_c_is_1,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g (x - mean) rstd of each channel over one part of one image, g = dL/dy."""
    n, c, start, end, out = _part(C, P, part_length, parts, BLOCK_C)
    group = n * (C // D) + c // D
    m = _column(mean, group, c < C)
    r = _column(rstd, group, c < C)
    w, b = _column(weight, c, c < C), _column(bias, c, c < C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    total_x = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(start, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < end)
        where = _offsets(n, c, p, stride_n, stride_c, stride_p)
        g = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
        normalized = (tl.load(x + where, mask=mask, other=0.0).to(tl.float32) - m) * r
        if RELU:
            g = tl.where(normalized * w + b > 0, g, 0.0)
        total += tl.sum(g, 1)
        total_x += tl.sum(tl.where(mask, g * normalized, 0.0), 1)
    tl.store(sums + out, total, mask=c < C)
    tl.store(sums_x + out, total_x, mask=c < C)


@_autotune
@triton.jit
def _input_gradient_kernel(
    grad, x, out, mean, rstd, weight, bias, group_sums, group_sums_x, C, P, D, values,
    stride_n, stride_c, stride_p, stride_c_is_1,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dL/dx = rstd (weight g - (S + S_x (x - mean) rstd) / values), S and S_x sums over a group."""
    c, group, where, mask = _tile(C, P, D, stride_n, stride_c, stride_p, BLOCK_C, BLOCK_P)
    m = _column(mean, group, c < C)
    r = _column(rstd, group, c < C)
    s = _column(group_sums, group, c < C)
    s_x = _column(group_sums_x, group, c < C)
    w = _column(weight, c, c < C)
    g = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
    normalized = (tl.load(x + where, mask=mask, other=0.0).to(tl.float32) - m) * r
    if RELU:
        g = tl.where(normalized * w + _column(bias, c, c < C) > 0, g, 0.0)
    value = r * (w * g - (s + s_x * normalized) / values)
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """As ``cpu_group_norm.forward``."""
    n, channels, positions = x.shape
    size = channels // num_groups
    parts, part_length = _parts(x)
    means, squares = x.new_empty((2, n, parts, channels), dtype=torch.float32)
    layout = *x.stride(), int(x.stride(1) == 1)
    _moments_kernel[_part_grid(x, parts)](
        x, means, squares, channels, positions, part_length, parts, *layout
    )
    mean, rstd = (x.new_empty((n, num_groups), dtype=torch.float32) for _ in range(2))
    block = min(triton.next_power_of_2(parts * size), _JOINED)
    _join_kernel[(n, num_groups)](
        means, squares, mean, rstd, channels, positions, size, part_length, parts,
        float(positions * size), eps, BLOCK=block,
    )  # fmt: skip
    _normalize_kernel[_tile_grid(x)](
        x, out, mean, rstd, weight, bias, channels, positions, size, *layout, RELU=relu
    )
    return mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cpu_group_norm.backward``."""
    n, channels, positions = x.shape
    num_groups = mean.shape[1]
    size = channels // num_groups
    parts, part_length = _parts(x)
    sums = x.new_empty((2, n, parts, channels), dtype=torch.float32)
    layout = *x.stride(), int(x.stride(1) == 1)
    _gradient_sums_kernel[_part_grid(x, parts)](
        grad, x, mean, rstd, weight, bias, *sums, channels, positions, size, part_length, parts,
        *layout, RELU=relu,
    )  # fmt: skip
    sums = sums.sum(2)
    group_sums = (sums * weight.float()).view(2, n, num_groups, size).sum(3)
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    _input_gradient_kernel[_tile_grid(x)](
        grad, x, out, mean, rstd, weight, bias, *group_sums, channels, positions, size,
        float(positions * size), *layout, RELU=relu,
    )  # fmt: skip
    bias_sums, weight_sums = sums
    return out, weight_sums.sum(0), bias_sums.sum(0)


def _parts(x: Tensor) -> tuple[int, int]:
    """In how many parts the positions are summed, and the length of each but the last."""
    n, channels, positions = x.shape
    if INTERPRETED:
        length = triton.cdiv(positions, 3)
    else:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        wanted = triton.cdiv(_PROGRAMS_A_PROCESSOR * processors, n * triton.cdiv(channels, 64))
        length = max(triton.cdiv(positions, wanted), _MIN_PART)
        length = 16 * triton.cdiv(length, 16)  # so that parts begin where memory is aligned
    return triton.cdiv(positions, length), length


def _part_grid(x: Tensor, parts: int):
    return lambda meta: (x.shape[0] * parts, triton.cdiv(x.shape[1], meta["BLOCK_C"]))


def _tile_grid(x: Tensor):
    n, channels, positions = x.shape
    return lambda meta: (
        n * triton.cdiv(positions, meta["BLOCK_P"]),
        triton.cdiv(channels, meta["BLOCK_C"]),
    )
