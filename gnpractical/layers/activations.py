"""Which of :data:`gnpractical.activation_gain.ACTIVATIONS` a PyTorch module or function is."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnpractical.activation_gain import ActivationGain, activation_gain

_FUNCTIONS: dict[str, tuple[Callable, ...]] = {
    "relu": (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    "prelu": (F.prelu, torch.prelu, Tensor.prelu),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "elu": (F.elu, F.elu_),
    "selu": (F.selu, F.selu_, torch.selu, torch.selu_),
    "sigmoid": (
        F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_,
        torch.special.expit,
    ),
    "tanh": (F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
    "softplus": (F.softplus,),
    "softsign": (F.softsign,),
    "logsigmoid": (F.logsigmoid,),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "relu6": (F.relu6,),
    "hardswish": (F.hardswish,),
    "mish": (F.mish,),
    "celu": (F.celu, F.celu_, torch.celu, torch.celu_),
    "hardtanh": (F.hardtanh, F.hardtanh_),
    "hardsigmoid": (F.hardsigmoid,),
}  # fmt: skip

# Each function at its default arguments; those of a call are not visible here.
ACTIVATION_FUNCTIONS: dict[Callable, str] = {
    function: name for name, functions in _FUNCTIONS.items() for function in functions
}

# The name of each module's function, and the parameter values for which it is that function.
_MODULES: dict[type[nn.Module], tuple[str, dict[str, float]]] = {
    nn.ReLU: ("relu", {}),
    nn.PReLU: ("prelu", {}),
    nn.GELU: ("gelu", {}),
    nn.SiLU: ("silu", {}),
    nn.ELU: ("elu", {"alpha": 1}),
    nn.SELU: ("selu", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Tanh: ("tanh", {}),
    nn.Softplus: ("softplus", {"beta": 1, "threshold": 20}),
    nn.Softsign: ("softsign", {}),
    nn.LogSigmoid: ("logsigmoid", {}),
    nn.Identity: ("identity", {}),
    nn.LeakyReLU: ("leaky_relu", {}),
    nn.ReLU6: ("relu6", {}),  # before Hardtanh, from which it derives
    nn.Hardswish: ("hardswish", {}),
    nn.Mish: ("mish", {}),
    nn.CELU: ("celu", {"alpha": 1}),
    nn.Hardtanh: ("hardtanh", {"min_val": -1, "max_val": 1}),
    nn.Hardsigmoid: ("hardsigmoid", {}),
}


def gain_of(
    activation: nn.Module | type[nn.Module] | Callable, sigma: float = 1.0
) -> ActivationGain:
    """The gains of a PyTorch activation for an input of standard deviation ``sigma``.

    Args:
        activation: a module such as ``nn.LeakyReLU(0.2)``, whose parameters count; a module class
            or one of :data:`ACTIVATION_FUNCTIONS`, at its defaults. A module derived from a known
            one counts as that one while it inherits ``forward``.
        sigma: as in :func:`~gnpractical.activation_gain.activation_gain`.

    Returns:
        ActivationGain: of an ``nn.PReLU`` with a slope per channel, the average over channels.

    Raises:
        ValueError: nothing is known of this activation, or only of other parameter values.
        TypeError, ValueError: for ``sigma``.
    """
    if isinstance(activation, type) and activation in _MODULES:
        activation = activation()
    if isinstance(activation, nn.Module):
        for base, (name, required) in _MODULES.items():
            if isinstance(activation, base) and type(activation).forward is base.forward:
                return _gain_of_module(activation, name, required, sigma)
    elif isinstance(activation, Hashable) and callable(activation):
        if activation in ACTIVATION_FUNCTIONS:
            return activation_gain(ACTIVATION_FUNCTIONS[activation], sigma)
    raise ValueError(
        f"no known gain for {activation!r} ({type(activation).__name__}); known are "
        f"{', '.join(f'nn.{module.__name__}' for module in _MODULES)}, and their functions"
    )


def _gain_of_module(
    module: nn.Module, name: str, required: dict[str, float], sigma: float
) -> ActivationGain:
    for parameter, value in required.items():
        if getattr(module, parameter) != value:
            raise ValueError(
                f"no known gain for {module}: only {parameter}={value} is covered, "
                f"got {getattr(module, parameter)}"
            )
    slope = None
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
    elif isinstance(module, nn.PReLU):
        # Both gains are (1 + slope^2)/2, Eq. (35), so their mean needs the mean square.
        slope = module.weight.detach().square().mean().sqrt().item()
    elif isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "gelu_tanh"
    return activation_gain(name, sigma, slope)
