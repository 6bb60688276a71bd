"""GroupNorm by whatever computes it fastest: PyTorch's kernel or ``gnpractical::group_norm``.

The operator ``torch.ops.gnpractical.group_norm`` keeps channels_last maps as they are. On a CPU it
is ``cpu_group_norm``, on a GPU ``triton_group_norm``. :func:`group_norm` chooses.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from gnpractical.layers import cpu_group_norm
from gnpractical.layers.transforms import is_transformed

# Off until measured on a GPU.
USE_TRITON = os.environ.get("GNPRACTICAL_TRITON", "0") == "1"
_MAX_INDEX = 2**31 - 1  # of the Triton kernels
_MAX_CHANNELS = 2**16 - 1  # of a CUDA grid's second dimension
_Outputs = tuple[Tensor, Tensor, Tensor]


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """``torch.group_norm`` of (N, C, *).

    Where Triton does it, the output has the input's dtype also under autocast, which would make
    ``torch.group_norm`` return float32.
    """
    if _has_faster(input, num_groups):
        if torch.compiler.is_compiling():
            return torch.ops.gnpractical.group_norm(input, num_groups, weight, bias, eps, False)[0]
        return _GroupNorm.apply(input, num_groups, weight, bias, eps, False)
    return torch.group_norm(input, num_groups, weight, bias, eps)


def _has_faster(input: Tensor, num_groups: int) -> bool:
    """Whether the operator beats PyTorch's kernel (benchmarks/group_norm.py)."""
    if input.is_cuda:
        return (
            USE_TRITON
            and (torch.compiler.is_compiling() or not is_transformed())
            and input.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and 0 < input.numel() <= _MAX_INDEX
            and input.shape[1] <= _MAX_CHANNELS
        )
    return (
        not is_transformed()
        and _layout(input) is torch.channels_last
        and input.shape[1] < 4 * num_groups  # channels; PyTorch's kernel is quick from 8 to a group
        and input.numel() >= 2**15
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
    )


_library = torch.library.Library("gnpractical", "DEF")
_library.define(
    "group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, bool relu)"
    " -> (Tensor output, Tensor mean, Tensor rstd)"
)
_library.define(
    "group_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor? bias, bool relu) -> (Tensor input, Tensor weight, Tensor bias)"
)


def _forward(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> _Outputs:
    given = [each for each in (weight, bias) if each is not None]
    channels = input.shape[1]
    if channels % num_groups or any(each.shape != (channels,) for each in given):
        raise ValueError(
            f"group_norm needs channels that {num_groups} groups divide, and as many weights and "
            f"biases; got an input of shape {tuple(input.shape)} and "
            f"{[tuple(each.shape) for each in given]}"
        )
    if not input.is_cuda and any(each.dtype != _wide(input.dtype) for each in given):
        raise TypeError(
            f"group_norm of {input.dtype} on a CPU needs weights and biases of "
            f"{_wide(input.dtype)}; got {[each.dtype for each in given]}"
        )
    if input.numel() == 0:
        return _forward_fake(input, num_groups)
    maps = input.contiguous(memory_format=_layout(input))
    y = torch.empty_like(maps)  # and no view of another tensor: a ReLU may overwrite it
    affine = _affine(input, weight, bias)
    with torch.cuda.device_of(input):
        mean, rstd = _kernels(input).forward(
            _by_position(maps), num_groups, *affine, eps, relu, _by_position(y)
        )
    return y, mean, rstd


def _backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> _Outputs:
    if input.numel() == 0:
        return _backward_fake(grad, input, mean)
    maps = input.contiguous(memory_format=_layout(input))
    grad = grad.contiguous(memory_format=_layout(input))
    affine = _affine(input, weight, bias)
    with torch.cuda.device_of(input):
        gradient, weight_gradient, bias_gradient = _kernels(input).backward(
            _by_position(grad), _by_position(maps), mean, rstd, *affine, relu
        )
    return gradient.view(maps.shape), weight_gradient, bias_gradient


def _forward_fake(input: Tensor, num_groups: int, *_: object) -> _Outputs:
    y = torch.empty_like(input, memory_format=_layout(input))
    mean = input.new_zeros(len(input), num_groups, dtype=_wide(input.dtype))
    return y, mean, torch.zeros_like(mean)


def _backward_fake(grad: Tensor, input: Tensor, mean: Tensor, *_: object) -> _Outputs:
    gradient = torch.empty_like(input, memory_format=_layout(input))
    channels = mean.new_zeros(input.shape[1])
    return gradient, channels, torch.zeros_like(channels)


def _layout(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and not tensor.is_contiguous():
        if tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_position(maps: Tensor) -> Tensor:
    """View of (N, C, *) as (N, C, P)."""
    return maps.view(*maps.shape[:2], -1)


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype, channels = _wide(input.dtype), input.shape[1]
    return (
        input.new_ones(channels, dtype=dtype) if weight is None else weight.contiguous(),
        input.new_zeros(channels, dtype=dtype) if bias is None else bias.contiguous(),
    )


def _kernels(input: Tensor) -> ModuleType:
    if not input.is_cuda:
        return cpu_group_norm
    try:
        from gnpractical.layers import triton_group_norm
    except ImportError as e:
        raise ImportError(
            f"GNPRACTICAL_TRITON=1 needs Triton, which PyTorch for CUDA brings on Linux; "
            f"unset it, or install triton ({e})"
        ) from None
    return triton_group_norm


def _save(ctx, inputs, output) -> None:
    input, ctx.num_groups, weight, bias, ctx.eps, ctx.relu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _differentiate(ctx, grad, *_, backward=torch.ops.gnpractical.group_norm_backward):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a gradient of the gradient, which PyTorch's own has
        return _differentiate_again(ctx, grad)
    gradient, weight_gradient, bias_gradient = backward(
        grad, input, mean, rstd, weight, bias, ctx.relu
    )
    weight_gradient = None if weight is None else weight_gradient.to(weight.dtype)
    bias_gradient = None if bias is None else bias_gradient.to(bias.dtype)
    return gradient, None, weight_gradient, bias_gradient, None, None


def _differentiate_again(ctx, grad):
    saved = dict(zip(("input", "weight", "bias"), ctx.saved_tensors, strict=False))
    # By aliases: the weight may itself depend on the input, or be the bias.
    aliases = {name: t.view_as(t) for name, t in saved.items() if t is not None}
    y = torch.group_norm(num_groups=ctx.num_groups, eps=ctx.eps, **aliases)
    y = y.relu() if ctx.relu else y
    needed = {name: t for name, t in aliases.items() if t.requires_grad}
    found = torch.autograd.grad(y, list(needed.values()), grad, create_graph=True)
    gradients = dict(zip(needed, found, strict=True))
    return gradients.get("input"), None, gradients.get("weight"), gradients.get("bias"), None, None


class _GroupNorm(torch.autograd.Function):
    """The operator without the dispatch of one, which takes as long as a small map."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        return _differentiate(ctx, grad, backward=_backward)


for _key in ("CPU", "CUDA"):
    _library.impl("group_norm", _forward, _key)
    _library.impl("group_norm_backward", _backward, _key)
torch.library.register_fake("gnpractical::group_norm", _forward_fake, lib=_library)
torch.library.register_fake("gnpractical::group_norm_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "gnpractical::group_norm", _differentiate, setup_context=_save, lib=_library
)
