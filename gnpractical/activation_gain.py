"""What an activation function does to the variance of a signal and of its gradient.

Source: Definition 2 and Sec. 2.3 of "On the Ideal Number of Groups for Isometric Gradient
Propagation", arXiv 2302.03193.
The paper's symbols: X ~ N(0, sigma^2) -> the activation's input, F -> ActivationGain.forward,
B -> ActivationGain.backward, a -> slope.

The paper samples the gains; here they are integrals, so they do not vary from run to run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

_LARGEST = 1e100  # no square of a number up to here leaves the range of floats


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


@dataclass(frozen=True)
class _Activation:
    function: Callable[[float], float]
    derivative: Callable[[float], float]
    kinks: tuple[float, ...] = ()  # where the derivative jumps; 0 need not be listed


def activation_gain(name: str, sigma: float = 1.0, slope: float | None = None) -> ActivationGain:
    """The gains of the activation ``name`` for an input X ~ N(0, sigma^2).

    Eqs. (23) and (24), Sec. 2.1, by adaptive quadrature (relative error below 1e-8).

    Args:
        name: one of :data:`ACTIVATIONS`, with PyTorch's definition at its default parameters.
        sigma: standard deviation of the input; 1 behind a GroupNorm.
        slope: slope for negative input of ``"prelu"`` (default 0.25) or ``"leaky_relu"``
            (default 0.01); no other activation has one.

    Raises:
        TypeError: ``name`` is not a string, or ``sigma`` or ``slope`` not a number.
        ValueError: the name is unknown, the activation has no slope, or a number is out of
            range: ``sigma`` from 1e-100 to 1e100, ``slope`` from -1e100 to 1e100.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r} ({type(name).__name__})")
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name.lower(), ACTIVATIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(ACTIVATIONS)}; got {name!r}.{hint}")
    _check_number("sigma", sigma, minimum=1 / _LARGEST)
    if slope is None:
        slope = _DEFAULT_SLOPES.get(name)
    elif name not in _DEFAULT_SLOPES:
        raise ValueError(f"slope is for {' and '.join(_DEFAULT_SLOPES)} only; {name} has none")
    else:
        _check_number("slope", slope, minimum=-_LARGEST)
        slope = float(slope)
    return _integrate(name, float(sigma), slope)


@lru_cache(maxsize=1024)
def _integrate(name: str, sigma: float, slope: float | None) -> ActivationGain:
    from scipy.integrate import quad  # here, so that importing gnpractical stays light

    f = _ACTIVATIONS[name] if slope is None else _leaky(slope)
    # Pieces end at the kinks, and at each power of ten: wherever a function does its bending
    # (|x| about 1), it is then not missed, however small that is beside sigma.
    # Beyond 12 sigma lies less than 1e-30 of the integral.
    decades = [10.0**k for k in range(math.ceil(math.log10(12 * sigma)))]
    bends = [0.0, *f.kinks, *decades, *(-x for x in decades)]
    ends = sorted({-12.0, 12.0, *(x / sigma for x in bends if abs(x) < 12 * sigma)})

    def mean(g: Callable[[float], float]) -> float:
        def integrand(z: float) -> float:
            value = g(sigma * z)
            return value * value * math.exp(-z * z / 2)

        pieces = [
            quad(integrand, a, b, epsabs=0, epsrel=1e-9, limit=200)[0]
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        return math.fsum(pieces) / math.sqrt(2 * math.pi)

    return ActivationGain(mean(lambda x: f.function(x) / sigma), mean(f.derivative))


def _check_number(argument: str, value: float, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number, got {value!r} ({type(value).__name__})")
    if not minimum <= value <= _LARGEST:
        raise ValueError(f"{argument} must be from {minimum:g} to {_LARGEST:g}, got {value}")


# The formulas below never take exp of a large positive number, and never subtract nearly equal
# ones, so that they hold at any x.


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _bell(x: float) -> float:
    """The derivative of the sigmoid."""
    return _sigmoid(x) * _sigmoid(-x)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _relu6(x: float) -> float:
    return min(max(x, 0.0), 6.0)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _normal_pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _mish_derivative(x: float) -> float:
    t = math.tanh(_softplus(x))
    return t + x * (1 - t * t) * _sigmoid(x)


# GELU's approximation x/2 (1 + tanh(u)) is x sigmoid(2u), for this 2u.
def _gelu_tanh_2u(x: float) -> float:
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)


def _gelu_tanh_derivative(x: float) -> float:
    u2 = _gelu_tanh_2u(x)
    slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return _sigmoid(u2) + x * _bell(u2) * slope


def _leaky(slope: float) -> _Activation:
    return _Activation(lambda x: x if x > 0 else slope * x, lambda x: 1.0 if x > 0 else slope)


def _scaled_elu(scale: float, alpha: float) -> _Activation:
    return _Activation(
        lambda x: scale * (x if x > 0 else alpha * math.expm1(x)),
        lambda x: scale * (1.0 if x > 0 else alpha * math.exp(x)),
    )


_DEFAULT_SLOPES = {"prelu": 0.25, "leaky_relu": 0.01}

_ACTIVATIONS = {
    # the paper's Table 2
    "relu": _leaky(0.0),
    "prelu": _leaky(_DEFAULT_SLOPES["prelu"]),
    "gelu": _Activation(
        lambda x: x * _normal_cdf(x), lambda x: _normal_cdf(x) + x * _normal_pdf(x)
    ),
    "silu": _Activation(lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) + x * _bell(x)),
    "elu": _scaled_elu(1.0, 1.0),
    "selu": _scaled_elu(1.0507009873554805, 1.6732632423543772),  # PyTorch's constants
    "sigmoid": _Activation(_sigmoid, _bell),
    "tanh": _Activation(math.tanh, lambda x: 4 * _bell(2 * x)),
    "softplus": _Activation(_softplus, _sigmoid),
    "softsign": _Activation(lambda x: x / (1 + abs(x)), lambda x: 1 / (1 + abs(x)) ** 2),
    "logsigmoid": _Activation(lambda x: -_softplus(-x), lambda x: _sigmoid(-x)),
    # others
    "identity": _Activation(lambda x: x, lambda x: 1.0),
    "leaky_relu": _leaky(_DEFAULT_SLOPES["leaky_relu"]),
    "relu6": _Activation(_relu6, lambda x: float(0 < x < 6), kinks=(6,)),
    "hardswish": _Activation(
        lambda x: x * _relu6(x + 3) / 6,
        lambda x: float(x > 0) if abs(x) > 3 else (2 * x + 3) / 6,
        kinks=(-3, 3),
    ),
    "mish": _Activation(lambda x: x * math.tanh(_softplus(x)), _mish_derivative),
    "celu": _scaled_elu(1.0, 1.0),  # at its default alpha the same as elu
    "hardtanh": _Activation(
        lambda x: min(max(x, -1.0), 1.0), lambda x: float(abs(x) < 1), kinks=(-1, 1)
    ),
    "hardsigmoid": _Activation(
        lambda x: _relu6(x + 3) / 6, lambda x: float(abs(x) < 3) / 6, kinks=(-3, 3)
    ),
    "gelu_tanh": _Activation(lambda x: x * _sigmoid(_gelu_tanh_2u(x)), _gelu_tanh_derivative),
}

ACTIVATIONS = tuple(_ACTIVATIONS)
