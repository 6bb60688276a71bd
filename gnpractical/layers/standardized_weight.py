"""The standardized weight of a convolution, its gradient, and how often it is computed.

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
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from gnpractical.layers.transforms import is_transformed

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
    """``standardize_weight(weight)`` of this convolution, once for all its calls of one step.

    While outputs of the convolution wait for their backward, its further calls share the result and
    its gradient, unless the weight has changed. On a CPU the memory is kept from step to step:
    fresh memory costs more than the arithmetic, since it has to be mapped.
    """
    if not _is_plain(weight):
        return standardize_weight(weight)
    if not torch.is_grad_enabled():
        state, constant = _CONSTANT.get(conv, (None, weight))
        if state == _state(weight):
            return constant
    kept = _KEPT.get(conv)
    if kept is None:
        kept = _KEPT[conv] = _Kept()
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return kept.standardize(weight)[0]
    shared = kept.shared(weight)
    if shared is None:
        shared = _StandardizeOnce.apply(weight, kept)
        kept.share(weight, shared)
    return shared


def keep_constant(conv: nn.Conv2d) -> None:
    """Standardize the weight for all calls without gradients until :func:`forget`.

    A change that PyTorch counts (in place, ``load_state_dict``) is seen all the same.
    """
    if _is_plain(conv.weight):
        with torch.no_grad():
            _CONSTANT[conv] = _state(conv.weight), standardize_weight(conv.weight)


def forget(conv: nn.Module) -> None:
    """Drop what is kept for this convolution."""
    _CONSTANT.pop(conv, None)
    _KEPT.pop(conv, None)


def _is_plain(weight: Tensor) -> bool:
    # Graphs that are compiled, traced or captured must hold the computation. Weights that are no
    # parameters (functional_call, parametrizations, replicas) are new tensors at every call.
    return (
        not is_transformed()
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.float64)
        and weight[0].numel() > 1
        and not weight.is_inference()
        and not weight.is_meta
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class _Kept:
    """What one convolution keeps: memory, and the result that waits for its backward."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []  # at most one, which a thread takes out to use it
        self._alone = 0
        self._shared: tuple[Any, TensorWeakRef] | None = None

    def standardize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`_standardize`, in memory that nothing else uses."""
        try:
            memory = self._memory.pop()
            fits = _place(memory) == _place(weight) and _users(memory) == self._alone
        except IndexError:
            fits = False
        if not fits:
            with torch.inference_mode(False):  # training may follow
                memory = torch.empty_like(
                    weight, requires_grad=False, memory_format=_format(weight)
                )
            self._alone = _users(memory)
        with torch.no_grad():
            _, rate, slope = _standardize(weight, EPS, memory)
        y = memory.detach()
        if weight.device.type == "cpu":
            self._memory[:] = [memory]
        return y, rate, slope

    def shared(self, weight: Tensor) -> Tensor | None:
        state, shared = self._shared or (None, lambda: None)
        return shared() if state == _state(weight) else None

    def share(self, weight: Tensor, y: Tensor) -> None:
        self._shared = _state(weight), TensorWeakRef(y)

    def expire(self) -> None:
        self._shared = None


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_CONSTANT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# Fused optimizers change weights without raising their version.
register_optimizer_step_post_hook(_count_step)


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Another one when the weight has changed, as far as PyTorch can tell."""
    return id(weight), weight.data_ptr(), weight._version, _steps


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, _format(tensor), tensor.dtype, tensor.device


def _users(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _rows(tensor: Tensor) -> Tensor:
    """(out, values of one filter), in the order they lie in memory."""
    if _format(tensor) is torch.channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1)


def _format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _standardize(
    weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = (w - mean) / u per filter of n values, u = s + eps, s the unbiased deviation.

    Returns:
        y, and what its gradient needs: 1 / u and -1 / ((n - 1) s), (out, 1) each.
    """
    mean = _rows(weight).mean(1).view(-1, *[1] * (weight.dim() - 1))
    if out is None:
        y = (weight - mean).contiguous(memory_format=_format(weight))
    else:
        y = torch.sub(weight, mean, out=out)
    rows = _rows(y)  # a view
    n = rows.shape[1]
    std = torch.linalg.vector_norm(rows, dim=1, keepdim=True).mul_((n - 1) ** -0.5)
    rate = (std + eps).reciprocal_()
    rows.mul_(rate)
    return y, rate, std.mul_(1 - n).clamp_(max=-_TINY).reciprocal_()


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
        y, rate, slope = _standardize(weight, eps)
        ctx.save_for_backward(y, rate, slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _gradient(grad, *ctx.saved_tensors), None


class _StandardizeOnce(torch.autograd.Function):
    """As ``_Standardize``, for any number of backwards and in kept memory.

    Two losses that share the result may be differentiated one after the other, so that nothing can
    go into the saved tensors, which the first backward frees: it is computed again if need be.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, kept: _Kept) -> Tensor:
        y, ctx.rate, ctx.slope = kept.standardize(weight)
        ctx.weight, ctx.version = weight, weight._version
        ctx.y = y.detach()  # y itself will hold this node
        ctx.kept = weakref.ref(kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                f"weight standardization: a weight of shape {tuple(ctx.weight.shape)} was modified "
                f"by an inplace operation between its forward and its backward; do both before "
                f"the optimizer's step"
            )
        kept = ctx.kept()
        if kept is not None:
            kept.expire()
        y, ctx.y = ctx.y, None
        if y is None:
            y, _, _ = _standardize(ctx.weight.detach(), EPS)
        # The result goes nowhere but into its convolution, whose gradient nobody else holds.
        return _gradient(grad, y, ctx.rate, ctx.slope, in_place=True), None
