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

# Off until measured on a GPU.
USE_TRITON = os.environ.get("GNPRACTICAL_TRITON", "0") == "1"
_MAX_INDEX = 2**31 - 1  # of the Triton kernels
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
    if torch.jit.is_tracing():
        return False
    if input.is_cuda:
        return (
            USE_TRITON
            and input.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and 0 < input.numel() <= _MAX_INDEX
        )
    return (
        _layout(input) is torch.channels_last
        and input.shape[1] < 4 * num_groups  # channels; PyTorch's kernel is quick from 8 to a group
        and input.numel() >= 2**15
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()  # which makes its own loops of PyTorch's
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
    sizes = [len(each) for each in (weight, bias) if each is not None]
    if input.shape[1] % num_groups or any(size != input.shape[1] for size in sizes):
        raise ValueError(
            f"group_norm needs channels that {num_groups} groups divide, and as many weights and "
            f"biases; got an input of shape {tuple(input.shape)} with {sizes or 'none'} of these"
        )
    if input.numel() == 0:
        return _forward_fake(input, num_groups)
    maps = input.contiguous(memory_format=_layout(input))
    y = torch.empty_like(maps)  # and no view of another tensor: a ReLU may overwrite it
    affine = _affine(input, weight, bias)
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
    gradient, weight_gradient, bias_gradient = _kernels(input).backward(
        _by_position(grad), _by_position(maps), mean, rstd, *_affine(input, weight, bias), relu
    )
    return gradient.view(maps.shape), weight_gradient, bias_gradient


def _forward_fake(input: Tensor, num_groups: int, *_: object) -> _Outputs:
    y = torch.empty_like(input, memory_format=_layout(input))
    dtype = torch.promote_types(input.dtype, torch.float32)
    mean = input.new_zeros(len(input), num_groups, dtype=dtype)
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


def _by_position(maps: Tensor) -> Tensor:
    """View of (N, C, *) as (N, C, P)."""
    return maps.view(*maps.shape[:2], -1)


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    channels = input.shape[1]
    return (
        input.new_ones(channels, dtype=dtype) if weight is None else weight,
        input.new_zeros(channels, dtype=dtype) if bias is None else bias,
    )


def _kernels(input: Tensor) -> ModuleType:
    if not input.is_cuda:
        return cpu_group_norm
    from gnpractical.layers import triton_group_norm

    return triton_group_norm


def _save(ctx, inputs, output) -> None:
    input, ctx.num_groups, weight, bias, ctx.eps, ctx.relu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _differentiate(ctx, grad, *_, backward=torch.ops.gnpractical.group_norm_backward):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a gradient of the gradient, which PyTorch's own has
        y = torch.group_norm(input, ctx.num_groups, weight, bias, ctx.eps)
        needed = [t for t in (input, weight, bias) if t is not None and t.requires_grad]
        found = torch.autograd.grad(y.relu() if ctx.relu else y, needed, grad, create_graph=True)
        gradients = dict(zip(map(id, needed), found, strict=True))
        return tuple(gradients.get(id(t)) for t in (input, None, weight, bias, None, None))
    gradient, weight_gradient, bias_gradient = backward(
        grad, input, mean, rstd, weight, bias, ctx.relu
    )
    weight_gradient = None if weight is None else weight_gradient.to(weight.dtype)
    bias_gradient = None if bias is None else bias_gradient.to(bias.dtype)
    return gradient, None, weight_gradient, bias_gradient, None, None


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
