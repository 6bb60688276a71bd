"""The standardized weight of a convolution, its gradient, and when it has to be computed anew.

Source: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
arXiv 1903.10520, in the form its authors and mmcv train with: (w - mean) / (std + 1e-5), with
the unbiased std. Other libraries put eps inside the root or use the biased std; their weights
are not interchangeable to the last digits.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-5
_TINY = 1e-20  # far below any real deviation


def standardize_weight(weight: Tensor, eps: float = EPS) -> Tensor:
    """``weight`` (out, in, *kernel) with each filter standardized, in the same dtype.

    Computed in float32 (float64 for float64) also under autocast and for half weights.

    Raises:
        ValueError: filters of a single value, whose deviation is undefined.
    """
    if weight[0].numel() < 2:
        raise ValueError(
            f"weight standardization needs filters of at least two values; "
            f"got a weight of shape {tuple(weight.shape)}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return _Standardize.apply(weight.to(dtype), eps).to(weight.dtype)


def standardized_weight_of(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """``standardize_weight(weight)`` of this convolution, computed once for all calls in a step.

    Calls before the next backward share one result and one gradient; without gradients the result
    is kept until the weight changes. It is computed anew after a backward, after an in-place
    change of the weight, and after :func:`forget`. A write through ``weight.data``, which autograd
    does not see either, is seen after the next backward or ``train()`` or ``eval()``.
    """
    if not _is_cacheable(weight):
        return standardize_weight(weight)
    cached = _CACHE.get(conv)
    if cached is None or not cached.is_of(weight):
        with torch.inference_mode(False):  # training may follow
            cached = _CACHE[conv] = _Cached(weight)
    return cached.get()


def forget(conv: nn.Module) -> None:
    """Drop what is kept of this convolution's standardized weight."""
    _CACHE.pop(conv, None)


def _is_cacheable(weight: Tensor) -> bool:
    # A graph that is compiled or captured must hold the computation. Weights that are no
    # parameters (functional_call, parametrizations, replicas) are new tensors at every call.
    return (
        type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.float64)
        and weight[0].numel() > 1
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not weight.is_inference()
        and not weight.is_meta
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class _Cached:
    """The standardized weight of one convolution, in memory that is kept from step to step.

    Fresh memory of this size costs a CPU more than the arithmetic, since it has to be mapped.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._place = _place(weight)
        self._version = -1
        self._value = _empty_like(weight)
        self._statistics: tuple[Tensor, Tensor] = (self._value, self._value)  # of _compute
        self._shared: Tensor | None = None  # _value as a function of the weight
        self._valid = False

    def is_of(self, weight: Tensor) -> bool:
        return self._weight is weight and self._place == _place(weight)

    def get(self) -> Tensor:
        if not self._valid or self._version != self._weight._version:
            self._compute()
        if not (torch.is_grad_enabled() and self._weight.requires_grad):
            return self._value
        if self._shared is None:
            self._shared = _Attach.apply(self._weight, self)
        return self._shared

    def _compute(self) -> None:
        # A graph that still holds this memory needs the values of the weight it saw. If the weight
        # has changed since, autograd shall find the memory changed as well, and say so.
        changed = self._version != self._weight._version
        with torch.inference_mode(False), torch.no_grad():
            self._statistics = _standardize(
                self._weight, EPS, self._value if changed else self._value.data
            )
        self._version = self._weight._version
        self._shared = None
        self._valid = True

    def expire(self) -> None:
        self._shared = None
        self._valid = False


_CACHE: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.device, weight.shape


def _rows(tensor: Tensor) -> Tensor:
    """View as (out, values of one filter), in the order they lie in memory; copies if it must."""
    if _format(tensor) is torch.channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1)


def _format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, requires_grad=False, memory_format=_format(weight))


def _standardize(weight: Tensor, eps: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """y = (w - mean) / u per filter of n values, u = s + eps, s the unbiased deviation, in ``out``.

    Returns:
        What the gradient needs: 1 / u and -1 / ((n - 1) s), (out, 1) each.
    """
    rows, y = _rows(weight), _rows(out)
    n = rows.shape[1]
    torch.sub(rows, rows.mean(1, keepdim=True), out=y)
    std = torch.linalg.vector_norm(y, dim=1, keepdim=True).mul_((n - 1) ** -0.5)
    rate = (std + eps).reciprocal_()
    y.mul_(rate)
    return rate, std.mul_(1 - n).clamp_(max=-_TINY).reciprocal_()


def _gradient(
    grad: Tensor, y: Tensor, rate: Tensor, slope: Tensor, *, in_place: bool = False
) -> Tensor:
    """dL/dw = (g - mean(g)) / u - y sum(g y) / ((n - 1) s), g = dL/dy.

    With ``in_place`` in the memory of ``grad``.
    """
    memory = grad.contiguous(memory_format=_format(y))
    g, y = _rows(memory), _rows(y)
    out, n = y.shape
    # The gradients of group norm's weight and bias, rstd sum(g (y - mean)) and sum(g): one pass
    # without memory. A constant filter has y = 0, and only the mean is taken off its gradient.
    _, share, total = torch.ops.aten.native_group_norm_backward(
        g[None], y[None], rate.new_zeros(1, out), slope.view(1, out), None, 1, out, n, out,
        [False, True, True],
    )  # fmt: skip
    mean = total[:, None].div_(n)
    if memory is grad and not in_place:
        memory = grad.clone()
        g = _rows(memory)
    g.sub_(mean).mul_(rate).addcmul_(y, share[:, None])
    return memory


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, eps: float) -> Tensor:
        y = _empty_like(weight)
        ctx.save_for_backward(y, *_standardize(weight, eps, y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _gradient(grad, *ctx.saved_tensors), None


class _Attach(torch.autograd.Function):
    """The cached value as a function of the weight, for any number of backwards.

    Two losses that used the convolution may be differentiated one after the other, so nothing goes
    into the saved tensors, which the first backward frees.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, cached: _Cached) -> Tensor:
        ctx.weight, ctx.version = weight, weight._version
        ctx.y, (ctx.rate, ctx.slope) = cached._value, cached._statistics
        ctx.cached = weakref.ref(cached)  # which holds this node
        return cached._value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                f"weight standardization: a weight of shape {tuple(ctx.weight.shape)} was modified "
                f"by an inplace operation between its forward and its backward; do both before "
                f"the optimizer's step"
            )
        cached = ctx.cached()
        if cached is not None:
            cached.expire()
        # The value goes nowhere but into its convolution, whose gradient nobody else holds.
        return _gradient(grad, ctx.y, ctx.rate, ctx.slope, in_place=True), None
