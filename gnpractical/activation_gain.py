"""What an activation function does to the variance of a signal and of its gradient.

Source: Definition 2 and Sec. 2.3 of "On the Ideal Number of Groups for Isometric Gradient
Propagation", arXiv 2302.03193.
The paper's symbols: X ~ N(0, sigma^2) is the activation's input, F is ActivationGain.forward, B is
ActivationGain.backward.

The paper samples the gains. Here they are integrals of PyTorch's own functions and of their
derivatives by autograd, so they do not vary from run to run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # These are the columns of the paper's Table 2.
    "relu": F.relu,
    "prelu": partial(F.leaky_relu, negative_slope=0.25),
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    # The paper has no values for these.
    "identity": Tensor.clone,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "celu": F.celu,
    "hardtanh": F.hardtanh,
    # In PyTorch the gradient of F.hardsigmoid itself is a sixth in float32.
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
ACTIVATIONS = tuple(_FUNCTIONS)


@dataclass(frozen=True)
class ActivationGain:
    """The two gains of one activation function at one standard deviation of its input.

    Attributes:
        forward: F = E[f(X)^2] / sigma^2, Eq. (23).
        backward: B = E[f'(X)^2], Eq. (24) for a gradient of zero mean.
    """

    forward: float
    backward: float

    @property
    def ratio(self) -> float:
        """F/B, the ``gain_ratio`` of :func:`~gnpractical.practical_num_groups`; 1 for ReLU."""
        return self.forward / self.backward


def activation_gain(name: str, sigma: float = 1.0) -> ActivationGain:
    """Return the gains of the activation ``name`` for an input X ~ N(0, sigma^2).

    :func:`integrate_gain` takes a function or a module instead.

    Args:
        name: One of :data:`ACTIVATIONS`, with PyTorch's definition at its default parameters.
        sigma: The standard deviation of the input, from 0.01 to 100; it is 1 behind a GroupNorm.

    Raises:
        TypeError: If ``name`` is not a string, or ``sigma`` not a number.
        ValueError: If the name is unknown, or ``sigma`` out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r} ({type(name).__name__})")
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name.lower(), ACTIVATIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(ACTIVATIONS)}; got {name!r}.{hint}")
    return integrate_gain(_FUNCTIONS[name], sigma)


@torch.inference_mode(False)  # Autograd works then, wherever the caller is.
def integrate_gain(function: Callable[[Tensor], Tensor], sigma: float) -> ActivationGain:
    """Integrate an element-wise function: Eqs. (23) and (24), Sec. 2.1 of arXiv 2302.03193.

    By the trapezoidal rule on a grid so fine that kinks make a relative error of 1e-5, and of 1e-3
    where sigma is 100.

    Args:
        function: An element-wise function of float64 tensors, which it may change in place, or a
            module of float64 parameters, such as ``nn.LeakyReLU(0.2)``.
        sigma: The standard deviation of the input, from 0.01 to 100.

    Raises:
        TypeError: If ``sigma`` is not a number.
        ValueError: If ``sigma`` is out of range, or the function fails, is flat everywhere or not
            finite.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(f"sigma must be a number, got {sigma!r} ({type(sigma).__name__})")
    if not 0.01 <= sigma <= 100:
        raise ValueError(f"sigma must be from 0.01 to 100, got {sigma}")
    sigma = float(sigma)
    # Beyond 12 sigma lies less than 1e-30 of the probability.
    z = torch.linspace(-12, 12, 2**20 + 1, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    x = (sigma * z).requires_grad_()
    try:
        y = function(x * 1).reshape(x.shape)  # "* 1", as a function in place may not write to x
        (slope,) = torch.autograd.grad(y.sum(), x)
    except Exception as error:
        raise ValueError(f"{function!r} is no element-wise activation: {error}") from error
    forward = torch.trapezoid(density * (y.detach() / sigma) ** 2, z).item()
    backward = torch.trapezoid(density * slope**2, z).item()
    if not (0 < backward < math.inf and math.isfinite(forward)):
        raise ValueError(f"the gains of {function!r} are zero or not finite at sigma {sigma:g}")
    return ActivationGain(forward, backward)
