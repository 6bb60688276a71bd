"""Weight standardization: every filter of a convolution with zero mean and unit deviation.

Source: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
arXiv 1903.10520, in the form its authors and mmcv train with: (w - mean) / (std + 1e-5), with
the unbiased std. Other libraries put eps inside the root or use the biased std; their weights
are not interchangeable to the last digits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gnpractical.layers.pairing import find_pairs

logger = logging.getLogger(__name__)

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


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` that convolves with its standardized weight; same state_dict keys."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardize_weight(weight), bias)


# The standardized class of each class of convolution; gnpractical.d2 adds Detectron2's.
STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: WSConv2d}


def standardize_layer(layer: nn.Module) -> bool:
    """Make ``layer`` convolve with standardized weights from now on, in place.

    Parameters, hooks and state_dict keys stay as they are: only the class changes.

    Returns:
        Whether it does; layers that are no 2d convolution, and those with filters of a single
        value, do not.
    """
    if isinstance(layer, nn.Conv2d) and type(layer) in STANDARDIZED and layer.weight[0].numel() > 1:
        layer.__class__ = STANDARDIZED[type(layer)]  # type: ignore[assignment]
    return isinstance(layer, WSConv2d)


def apply_weight_standardization(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Standardize, in place, the convolutions under ``prefixes`` that are followed by a norm.

    Parameters, hooks and state_dict keys stay as they are: only the class changes. Convolutions
    of other classes (Detectron2's deformable ones) are left alone and logged.

    Args:
        model: any model.
        prefixes: module paths, such as "backbone" or "roi_heads.box_head".

    Returns:
        Paths of the convolutions that are standardized.

    Raises:
        ValueError: a prefix under which there is nothing to standardize.
    """
    done, skipped = [], []
    pairs = [
        (p.layer_name, p.layer)
        for p in find_pairs(model)
        if p.layer_name is not None and p.layer is not None
    ]
    for prefix in prefixes:
        found = [(n, m) for n, m in pairs if n == prefix or n.startswith(f"{prefix}.")]
        if not found:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"weight standardization: {prefix!r} has no weight layer followed by a norm; "
                f"module paths start with one of: {known}."
            )
        for name, layer in found:
            if standardize_layer(layer):
                done.append(name)
            else:
                skipped.append(f"{name} ({type(layer).__name__})")
    logger.info("Weight standardization of %d convolutions under %s", len(done), list(prefixes))
    if skipped:
        logger.warning(
            "Not standardized, no plain convolutions: %d, first: %s", len(skipped), skipped[:3]
        )
    return done


def fold_weight_standardization(model: nn.Module) -> int:
    """Give every weight standardized convolution its standardized weights for good, in place.

    For inference: the outputs stay the same and nothing is left to compute. The model is no longer
    to be trained.

    Returns:
        How many convolutions were folded.
    """
    plain = {standardized: cls for cls, standardized in STANDARDIZED.items()}
    folded = [module for module in model.modules() if isinstance(module, WSConv2d)]
    for module in folded:
        with torch.no_grad():
            module.weight.copy_(standardize_weight(module.weight))
        module.__class__ = plain[type(module)]  # type: ignore[assignment]
    return len(folded)


class _Standardize(torch.autograd.Function):
    """y = (w - mean) / u per filter of n values, with u = s + eps, s the unbiased deviation.

    In place on one tensor: a fresh one costs more than the arithmetic, since its memory has to be
    mapped. Backward is layer norm's, whose kernel is one pass: with dL/dy = g and x = w - mean,

        dL/dw = t (r (g - mean(g)) - x sum(g x) r^3 / n),  r^2 = n / ((n - 1) s u),  t = 1 / (r u).
    """

    @staticmethod
    def forward(ctx, weight: Tensor, eps: float) -> Tensor:
        flat = weight.flatten(1)
        mean = flat.mean(1, keepdim=True)
        y = flat - mean
        std = torch.linalg.vector_norm(y, dim=1, keepdim=True).mul_((y.shape[1] - 1) ** -0.5)
        divisor = std + eps
        y.mul_(divisor.reciprocal())
        ctx.save_for_backward(weight, mean, std, divisor)
        return y.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, mean, std, divisor = (saved.flatten(1) for saved in ctx.saved_tensors)
        n = weight.shape[1]
        # A constant filter has x = 0, and only the mean is taken off its gradient.
        rstd = std.mul((n - 1) / n).clamp_(min=_TINY).mul_(divisor).rsqrt_()
        out, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.reshape(weight.shape), weight, (n,), mean, rstd, None, None, [True, False, False]
        )
        return out.mul_((divisor * rstd).reciprocal_()).view(grad.shape), None
