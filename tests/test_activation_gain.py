import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit, ndtr

from gnpractical.activation_gain import (
    ACTIVATIONS,
    ActivationGain,
    activation_gain,
    integrate_gain,
)
from gnpractical.num_groups import ideal_num_groups

SIGMAS = [0.01, 0.1, 1, 20, 100]


def normal_pdf(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    "name, expected",
    [
        ("relu", 1 / 2),
        ("prelu", (1 + 0.25**2) / 2),
        ("leaky_relu", (1 + 0.01**2) / 2),
        ("identity", 1),
    ],
)
def test_homogeneous_functions_have_equal_gains_at_every_sigma(name, expected, sigma):
    # Eq. (35) and Remark 2
    gain = activation_gain(name, sigma)
    assert gain.forward == pytest.approx(expected, rel=1e-4)
    assert gain.backward == pytest.approx(expected, rel=1e-4)
    assert gain.ratio == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_closed_forms_of_gelu(sigma):
    # With Phi(x) = P(U < x): E[X^2 Phi^2] and E[(Phi + X phi)^2] are moments of three normals.
    s2 = sigma * sigma
    root = math.sqrt(1 + 2 * s2)
    orthant = 1 / 4 + math.atan2(s2, root) / (2 * math.pi)  # E[Phi(X)^2]
    # E[2 X Phi phi] by Stein's lemma, E[X^2 phi^2] as a Gaussian integral
    cross = s2 / (math.pi * (1 + s2) * root)
    square = s2 / (2 * math.pi * root**3)
    gain = activation_gain("gelu", sigma)
    assert gain.forward == pytest.approx(orthant + cross, rel=1e-4)
    assert gain.backward == pytest.approx(orthant + cross + square, rel=1e-4)


def clipped(sigma, low, high):
    """The gains of a clamp, whose second moment on [0, t] is Phi(t) - 1/2 - t phi(t)."""
    a, b = low / sigma, high / sigma
    inside = ndtr(b) - ndtr(a)
    moment = inside - b * normal_pdf(b) + a * normal_pdf(a)
    return moment + a * a * ndtr(a) + b * b * ndtr(-b), inside


@pytest.mark.parametrize("sigma", [0.3, 1, 20, 100])
def test_closed_forms_of_the_clipped_functions(sigma):
    for name, ends in {"relu6": (0, 6), "hardtanh": (-1, 1)}.items():
        forward, backward = clipped(sigma, *ends)
        gain = activation_gain(name, sigma)
        assert gain.forward == pytest.approx(forward, rel=1e-3)
        assert gain.backward == pytest.approx(backward, rel=1e-3)
    # hardsigmoid is 1/2 + hardtanh(x / 3) / 2
    shrunk = activation_gain("hardtanh", sigma / 3)
    gain = activation_gain("hardsigmoid", sigma)
    assert gain.forward == pytest.approx(1 / (4 * sigma**2) + shrunk.forward / 36, rel=1e-3)
    assert gain.backward == pytest.approx(shrunk.backward / 36, rel=1e-3)


def softplus(x):
    return np.logaddexp(0, x)


def mish_slope(x):
    t = np.tanh(softplus(x))
    return t + x * (1 - t * t) * expit(x)


# gelu_tanh is x expit(u), and this is u.
def scaled_cubic(x):
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


def gelu_tanh_slope(x):
    u = scaled_cubic(x)
    inner = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return expit(u) + x * expit(u) * expit(-u) * inner


SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772  # of SELU

FORMULAS = {
    "silu": (lambda x: x * expit(x), lambda x: expit(x) * (1 + x * expit(-x))),
    "elu": (lambda x: max(x, np.expm1(min(x, 0))), lambda x: np.exp(min(x, 0))),
    "selu": (
        lambda x: SCALE * (x if x > 0 else ALPHA * np.expm1(x)),
        lambda x: SCALE * (1 if x > 0 else ALPHA * np.exp(x)),
    ),
    "sigmoid": (expit, lambda x: expit(x) * expit(-x)),
    "tanh": (np.tanh, lambda x: 4 * expit(2 * x) * expit(-2 * x)),
    "softplus": (softplus, expit),
    "softsign": (lambda x: x / (1 + abs(x)), lambda x: (1 + abs(x)) ** -2),
    "hardswish": (
        lambda x: x * min(max(x + 3, 0), 6) / 6,
        lambda x: (2 * x + 3) / 6 if abs(x) < 3 else float(x > 0),
    ),
    "mish": (lambda x: x * np.tanh(softplus(x)), mish_slope),
    "gelu_tanh": (lambda x: x * expit(scaled_cubic(x)), gelu_tanh_slope),
}


def mean_square(f, sigma):
    """E[f(X)^2] by SciPy."""
    ends = {x / sigma for k in range(-7, 8) for x in (10.0**k, 3 * 10.0**k) if x < 12 * sigma}
    ends = sorted({0, 12} | ends | {-x for x in ends | {12}})
    pieces = [
        quad(lambda z: f(sigma * z) ** 2 * normal_pdf(z), a, b, epsabs=0, epsrel=1e-4)[0]
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    return math.fsum(pieces)


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")  # of empty tails
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_integrated_by_scipy(name, sigma):
    f, derivative = FORMULAS[name]
    gain = activation_gain(name, sigma)
    assert gain.forward == pytest.approx(mean_square(f, sigma) / sigma**2, rel=1e-4)
    assert gain.backward == pytest.approx(mean_square(derivative, sigma), rel=1e-4)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_relations_between_functions(sigma):
    assert activation_gain("celu", sigma) == activation_gain("elu", sigma)
    mirrored, plain = activation_gain("logsigmoid", sigma), activation_gain("softplus", sigma)
    assert mirrored.forward == pytest.approx(plain.forward, rel=1e-4)
    assert mirrored.backward == pytest.approx(plain.backward, rel=1e-4)


def test_selu_keeps_unit_variance():
    # the property its two constants were derived from
    assert activation_gain("selu").forward == pytest.approx(1, rel=1e-4)


def test_ratio_is_forward_over_backward_and_what_num_groups_takes():
    assert ActivationGain(3.0, 2.0).ratio == 1.5
    # Sec. 2.3: (F/B n_in - n_out)/4 with the paper's F and B of Tanh at sigma 1
    ideal = ideal_num_groups(256, 128, activation_gain("tanh").ratio)
    assert ideal == pytest.approx((0.394 / 0.464 * 256 - 128) / 4, abs=0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(mode):
    with mode():
        assert activation_gain("mish", np.float64(1)) == activation_gain("mish")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ReLU", "relu, prelu, gelu, .*got 'ReLU'. Did you mean 'relu'"),
        ("swish", "Did you mean 'hardswish'"),
        ("", "got ''.$"),
    ],
)
def test_unknown_name(name, expected):
    with pytest.raises(ValueError, match=expected) as error:
        activation_gain(name)
    assert all(known in str(error.value) for known in ACTIVATIONS)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), 9.9e-3, 101])
def test_sigma_out_of_range(bad):
    with pytest.raises(ValueError, match=f"sigma must be from 0.01 to 100, got {bad}"):
        activation_gain("relu", bad)


@pytest.mark.parametrize("bad", ["1", None, True, [1]])
def test_sigma_of_other_types(bad):
    with pytest.raises(TypeError, match="sigma must be a number, got"):
        activation_gain("relu", bad)


@pytest.mark.parametrize("slope", [0.3, -0.5, 1.7])
def test_modules_and_functions_are_integrated_with_their_parameters(slope):
    gain = integrate_gain(torch.nn.LeakyReLU(slope), 3)
    assert gain.forward == pytest.approx((1 + slope**2) / 2, rel=1e-4)
    assert gain.ratio == pytest.approx(1, rel=1e-4)
    prelu = torch.nn.PReLU(init=slope).double()
    assert integrate_gain(prelu, 3).ratio == pytest.approx(1, rel=1e-4)
    assert integrate_gain(torch.nn.Threshold(slope, -1), 1).backward == pytest.approx(
        ndtr(-slope), rel=1e-4
    )


def test_a_name_that_is_no_string():
    with pytest.raises(TypeError, match="name must be a string, got None"):
        activation_gain(None)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x.sum(), "is no element-wise activation: shape"),
        (lambda x: x[:1], "is no element-wise activation: shape"),
        (lambda x: x.detach(), "is no element-wise activation: .*grad"),
        (lambda x: 1 / 0, "is no element-wise activation: division by zero"),
        (lambda x: (x, x), "is no element-wise activation: 'tuple'"),
        (torch.log, "or not finite at sigma 2"),
        (torch.sign, "are zero or"),
    ],
)
def test_what_is_no_activation(function, expected):
    with pytest.raises(ValueError, match=expected):
        integrate_gain(function, 2)
