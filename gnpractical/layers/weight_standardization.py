"""Convolutions that standardize their weights: every filter with zero mean and unit deviation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.standardized_weight import (
    forget,
    keep_constant,
    standardize_weight,
    standardized_weight_of,
)

logger = logging.getLogger(__name__)


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` that convolves with its standardized weight; same state_dict keys."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardized_weight_of(self, weight), bias)


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


@contextlib.contextmanager
def standardized_once(model: nn.Module) -> Iterator[None]:
    """Within, calls of ``model`` without gradients do not standardize its weights anew.

    For evaluation, where nobody writes to the weights. A change that PyTorch counts (in place,
    ``load_state_dict``) is seen all the same; one through ``weight.data`` is not.
    """
    convs = [module for module in model.modules() if isinstance(module, WSConv2d)]
    for conv in convs:
        keep_constant(conv)
    try:
        yield
    finally:
        for conv in convs:
            forget(conv)


def fold_weight_standardization(model: nn.Module) -> int:
    """Give every weight standardized convolution its standardized weights for good, in place.

    For inference: the outputs stay the same and nothing is left to compute. The model is no longer
    to be trained.

    Returns:
        How many convolutions were folded.

    Raises:
        TypeError: a subclass of ``WSConv2d`` that has no plain class; nothing is folded.
    """
    plain = {standardized: cls for cls, standardized in STANDARDIZED.items()}
    convs = [module for module in model.modules() if isinstance(module, WSConv2d)]
    for conv in convs:
        if type(conv) not in plain:
            raise TypeError(
                f"fold_weight_standardization knows {', '.join(c.__name__ for c in plain)}; "
                f"got a {type(conv).__name__}. Remove its parametrizations, or add its plain class "
                f"to gnpractical.layers.weight_standardization.STANDARDIZED."
            )
    with torch.no_grad():
        for weight in {conv.weight for conv in convs}:  # which convolutions may share
            weight.copy_(standardize_weight(weight))
    for conv in convs:
        forget(conv)
        conv.__class__ = plain[type(conv)]  # type: ignore[assignment]
    return len(convs)
