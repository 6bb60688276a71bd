"""Weight standardization: convolutions whose filters have zero mean and unit deviation.

Source: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
arXiv 1903.10520. It is layer norm over each filter, so PyTorch's layer norm computes it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnpractical.layers.pairing import NormPair, check_model, find_pairs

logger = logging.getLogger(__name__)

EPS = 1e-5


def standardize_weight(weight: Tensor, eps: float = EPS) -> Tensor:
    """``weight`` (out, in, *kernel) with each filter standardized, in the same dtype.

    The reference, which its authors and mmcv train with, is (w - mean) / (std + eps) with the
    unbiased std. Here eps**2 is added to the variance instead, so that a weight differs from the
    reference by a factor of 1 + eps/std: 0.1% at a std of 0.01, and the same for all filters of
    like std, which a following norm removes. Computed in float32 at least, whatever the dtype.

    Raises:
        ValueError: The filters have a single value each, whose deviation is undefined.
    """
    n = weight[0].numel()
    if n < 2:
        raise ValueError(
            f"weight standardization needs filters of at least two values; "
            f"got a weight of shape {tuple(weight.shape)}"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # From the biased to the unbiased deviation. As layer norm's weight it takes no pass of its own.
    unbiased = wide.new_full(weight.shape[1:], math.sqrt((n - 1) / n))
    return F.layer_norm(wide, weight.shape[1:], unbiased, eps=eps**2).to(weight.dtype)


torch.fx.wrap("standardize_weight")  # a traced weight's shape and type are not known


class Standardized:
    """What makes a convolution convolve with its standardized weight; same state_dict keys."""

    # The public forward() of convolutions offers no other place between a weight and its use.
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardize_weight(weight), bias)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile weight standardization: first call "
            "gnpractical.fold_weight_standardization(model), or export with torch.export"
        )


class WSConv1d(Standardized, nn.Conv1d):
    """``nn.Conv1d``, weight standardized."""


class WSConv2d(Standardized, nn.Conv2d):
    """``nn.Conv2d``, weight standardized."""


class WSConv3d(Standardized, nn.Conv3d):
    """``nn.Conv3d``, weight standardized."""


# The standardized class of each class of convolution; gnpractical.d2 adds Detectron2's.
STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: WSConv1d,
    nn.Conv2d: WSConv2d,
    nn.Conv3d: WSConv3d,
}


def standardize_layer(layer: nn.Module) -> bool:
    """Make ``layer`` convolve with standardized weights from now on, in place.

    Parameters, hooks and state_dict keys stay as they are: only the class changes.

    Returns:
        Whether it does. Layers of other classes do not, transposed convolutions among them, nor do
        those with filters of a single value.
    """
    weight = getattr(layer, "weight", None)
    if type(layer) in STANDARDIZED and isinstance(weight, Tensor) and weight[0].numel() > 1:
        layer.__class__ = STANDARDIZED[type(layer)]  # type: ignore[assignment]
    return isinstance(layer, Standardized)


def unstandardize_layer(layer: nn.Module) -> None:
    """Undo :func:`standardize_layer`, in place."""
    plain = {standardized: cls for cls, standardized in STANDARDIZED.items()}
    layer.__class__ = plain.get(type(layer), type(layer))  # type: ignore[assignment]


def is_weight_standardized(pair: NormPair) -> bool:
    """Whether a layer that feeds this norm convolves with standardized weights."""
    return any(isinstance(layer, Standardized) for layer in pair.layers.values())


def apply_weight_standardization(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Standardize, in place, the convolutions under ``prefixes`` that feed a norm.

    Convolutions of other classes, such as Detectron2's deformable ones, are left alone and logged.

    Args:
        model: Any model.
        prefixes: Module paths, such as "backbone" or "roi_heads.box_head".

    Returns:
        Paths of the convolutions that are standardized.

    Raises:
        ValueError: A prefix under which there is nothing to standardize.
    """
    feeding = {name: layer for pair in find_pairs(model) for name, layer in pair.layers.items()}
    done, skipped = [], []
    for prefix in prefixes:
        found = {n: m for n, m in feeding.items() if n == prefix or n.startswith(f"{prefix}.")}
        if not found:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"weight standardization: {prefix!r} has no weight layer followed by a norm; "
                f"module paths start with one of: {known}."
            )
        for name, layer in found.items():
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

    Raises:
        TypeError: A convolution cannot be folded, or shares its weight. Nothing is folded.
    """
    check_model(model)
    convs: list[Any] = [module for module in model.modules() if isinstance(module, Standardized)]
    weights = {conv.weight for conv in convs}
    for name, module in model.named_modules():
        if isinstance(module, Standardized):
            is_parameter = isinstance(getattr(module, "weight", None), nn.Parameter)
            foldable = type(module) in STANDARDIZED.values() and is_parameter
        else:
            foldable = weights.isdisjoint(module.parameters(recurse=False))
        if not foldable:
            raise TypeError(
                f"fold_weight_standardization takes convolutions whose weight is a parameter "
                f"and no other layer's; got {name!r}, a {type(module).__name__}. Remove its "
                f"parametrizations or pruning, or give it a weight of its own."
            )
    with torch.no_grad():
        for weight in weights:  # which convolutions may share
            weight.copy_(standardize_weight(weight))
    for conv in convs:
        unstandardize_layer(conv)
    return len(convs)
