"""The gains of PyTorch's activation modules and functions, and how to recognise the functions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnpractical.activation_gain import (
    ACTIVATIONS,
    ActivationGain,
    activation_gain,
    integrate_gain,
)

ACTIVATION_FUNCTIONS: dict[Callable, str] = {
    getattr(home, name + ending): name
    for name in ACTIVATIONS
    for home in (F, torch, Tensor)
    for ending in ("", "_")  # PyTorch ends the names of in-place functions in an underscore.
    if hasattr(home, name + ending)
} | {torch.special.expit: "sigmoid"}
"""The name of each function of PyTorch that is one of the known activations."""


def gain_of(
    activation: nn.Module | type[nn.Module] | Callable[[Tensor], Tensor], sigma: float = 1.0
) -> ActivationGain:
    """Return the gains of a PyTorch activation for an input of standard deviation ``sigma``.

    Args:
        activation: A module such as ``nn.LeakyReLU(0.2)``, whose parameters count and which is
            taken in evaluation mode; a module class at its defaults; or an element-wise function
            of a tensor, where ``F.prelu`` has the initial slope of ``nn.PReLU``.
        sigma: The standard deviation of the input, from 0.01 to 100; it is 1 behind a GroupNorm.

    Returns:
        ActivationGain: The gains. Those of an ``nn.PReLU`` with a slope for each channel are
        averages over the channels.

    Raises:
        TypeError: If ``activation`` cannot be called, or ``sigma`` is not a number.
        ValueError: If ``sigma`` is out of range, or the activation cannot be integrated.
    """
    if not callable(activation):
        raise TypeError(f"activation must be a module, a class or a function, got {activation!r}")
    if activation in (F.prelu, torch.prelu, Tensor.prelu):
        return activation_gain("prelu", sigma)
    if isinstance(activation, type):
        return gain_of(activation(), sigma)
    if not isinstance(activation, nn.Module):
        return integrate_gain(activation, sigma)
    if isinstance(activation, nn.PReLU) and type(activation).forward is nn.PReLU.forward:
        # Both gains are (1 + slope^2) / 2, Eq. (35), so their mean needs the mean square.
        slope = activation.weight.detach().double().square().mean().sqrt().item()
        return activation_gain("prelu", sigma, slope)
    return integrate_gain(copy.deepcopy(activation).to("cpu", torch.float64).eval(), sigma)
