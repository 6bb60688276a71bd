import math
import subprocess
import sys

import numpy as np
import pytest

from gnpractical.activation_gain import ACTIVATIONS, ActivationGain, activation_gain
from gnpractical.num_groups import ideal_num_groups


def trapezoid(f, sigma):
    """E[f(X)^2] by a dense trapezoid; none of the quadrature's pieces or scales."""
    z = np.linspace(-10, 10, 2_000_001)
    values = f(sigma * z) ** 2 * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(values, z))


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1, 10, 100])
@pytest.mark.parametrize(
    "name, slope, expected",
    [
        ("relu", None, 1 / 2),
        ("prelu", None, (1 + 0.25**2) / 2),
        ("leaky_relu", None, (1 + 0.01**2) / 2),
        ("prelu", 0.5, 5 / 8),
        ("leaky_relu", -2, 5 / 2),
        ("leaky_relu", 0, 1 / 2),
        ("prelu", 1, 1),
        ("identity", None, 1),
    ],
)
def test_homogeneous_functions_have_equal_gains_at_every_sigma(name, slope, expected, sigma):
    # Eq. (35) and Remark 2
    gain = activation_gain(name, sigma, slope)
    assert gain.forward == pytest.approx(expected, rel=1e-12)
    assert gain.backward == pytest.approx(expected, rel=1e-12)
    assert gain.ratio == pytest.approx(1, rel=1e-12)


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1, 10, 100])
def test_closed_forms_of_gelu(sigma):
    # With Phi(x) = P(U < x): E[X^2 Phi^2] and E[(Phi + X phi)^2] are moments of three normals.
    s2 = sigma * sigma
    r = s2 / (1 + s2)
    root = math.sqrt(1 + 2 * s2)
    orthant = 1 / 4 + math.asin(r) / (2 * math.pi)  # E[Phi(X)^2]
    forward = orthant + s2 / (math.pi * (1 + s2) * root)
    # E[2 X Phi phi] by Stein's lemma, E[X^2 phi^2] as a Gaussian integral
    cross = s2 / (math.pi * (1 + s2) * root)
    square = s2 / (2 * math.pi * root**3)
    gain = activation_gain("gelu", sigma)
    assert gain.forward == pytest.approx(forward, rel=1e-9)
    assert gain.backward == pytest.approx(orthant + cross + square, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 1, 10])
def test_closed_forms_of_the_clipped_functions(sigma):
    # the second moment of a normal on [0, t] in units of sigma is Phi(t) - 1/2 - t phi(t)
    def on_interval(t):
        pdf = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        return normal_cdf(t) - 1 / 2 - t * pdf, normal_cdf(t) - 1 / 2, normal_cdf(-t)

    moment, inside, beyond = on_interval(6 / sigma)
    gain = activation_gain("relu6", sigma)
    assert gain.forward == pytest.approx(moment + 36 * beyond / sigma**2, rel=1e-9)
    assert gain.backward == pytest.approx(inside, rel=1e-9)

    moment, inside, beyond = on_interval(1 / sigma)
    gain = activation_gain("hardtanh", sigma)
    assert gain.forward == pytest.approx(2 * moment + 2 * beyond / sigma**2, rel=1e-9)
    assert gain.backward == pytest.approx(2 * inside, rel=1e-9)

    # hardsigmoid is 1/2 + hardtanh(x / 3) / 2
    shrunk = activation_gain("hardtanh", sigma / 3)
    gain = activation_gain("hardsigmoid", sigma)
    assert gain.forward == pytest.approx(1 / (4 * sigma**2) + shrunk.forward / 36, rel=1e-9)
    assert gain.backward == pytest.approx(shrunk.backward / 36, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 1, 10])
@pytest.mark.parametrize(
    "name, f, derivative",
    [
        ("sigmoid", sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
        ("tanh", np.tanh, lambda x: 1 - np.tanh(x) ** 2),
        ("softplus", lambda x: np.log(1 + np.exp(x)), sigmoid),
        ("silu", lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
        ("gelu_tanh", gelu_tanh, lambda x: (gelu_tanh(x + 1e-5) - gelu_tanh(x - 1e-5)) / 2e-5),
        ("elu", lambda x: np.where(x > 0, x, np.exp(x) - 1), lambda x: np.exp(np.minimum(x, 0))),
    ],
)
def test_against_a_dense_trapezoid(name, f, derivative, sigma):
    gain = activation_gain(name, sigma)
    assert gain.forward == pytest.approx(trapezoid(f, sigma) / sigma**2, rel=1e-6)
    assert gain.backward == pytest.approx(trapezoid(derivative, sigma), rel=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 1, 10])
def test_relations_between_functions(sigma):
    assert activation_gain("celu", sigma) == activation_gain("elu", sigma)
    mirrored, plain = activation_gain("logsigmoid", sigma), activation_gain("softplus", sigma)
    assert mirrored.forward == pytest.approx(plain.forward, rel=1e-9)
    assert mirrored.backward == pytest.approx(plain.backward, rel=1e-9)
    # sigmoid is softplus's derivative, and 1/2 + tanh(x / 2) / 2
    sigmoid, half = activation_gain("sigmoid", sigma), activation_gain("tanh", sigma / 2)
    assert plain.backward == pytest.approx(sigmoid.forward * sigma**2, rel=1e-9)
    assert sigmoid.forward == pytest.approx(1 / (4 * sigma**2) + half.forward / 16, rel=1e-9)
    assert sigmoid.backward == pytest.approx(half.backward / 16, rel=1e-9)


def test_selu_keeps_unit_variance():
    # the property its two constants were derived from
    assert activation_gain("selu").forward == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "softsign", "hardtanh"])
def test_small_inputs_see_the_slope_at_zero_and_large_ones_the_limits(name):
    small, large = activation_gain(name, 1e-6), activation_gain(name, 1e6)
    assert small.forward == pytest.approx(1, rel=1e-5)
    assert small.backward == pytest.approx(1, rel=1e-5)
    assert large.forward == pytest.approx(1e-12, rel=1e-4)


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "gelu_tanh", "hardswish", "softplus"])
def test_large_inputs_see_relu(name):
    gain = activation_gain(name, 1e5)
    assert gain.forward == pytest.approx(1 / 2, rel=1e-4)
    assert gain.backward == pytest.approx(1 / 2, rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sigma", [1e-100, 1e-3, 100, 1e100])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nothing_overflows(name, sigma):
    gain = activation_gain(name, sigma)
    assert 0 < gain.forward < math.inf
    assert 0 < gain.backward < math.inf


def test_ratio_is_forward_over_backward_and_what_num_groups_takes():
    assert ActivationGain(3.0, 2.0).ratio == 1.5
    # Sec. 2.3: (F/B n_in - n_out)/4 with the paper's F and B of Tanh at sigma 1
    ideal = ideal_num_groups(256, 128, activation_gain("tanh").ratio)
    assert ideal == pytest.approx((0.394 / 0.464 * 256 - 128) / 4, abs=0.1)


def test_equal_calls_are_computed_once():
    assert activation_gain("mish", 1) is activation_gain("mish", np.float64(1))
    assert activation_gain("prelu") is activation_gain("prelu", slope=0.25)
    assert activation_gain("prelu", slope=1) is not activation_gain("prelu", slope=2)


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


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), 1e-101, 1e101])
def test_sigma_out_of_range(bad):
    with pytest.raises(ValueError, match="sigma must be from 1e-100 to 1e\\+100"):
        activation_gain("relu", bad)


@pytest.mark.parametrize("bad", ["1", None, True, [1]])
def test_sigma_of_other_types(bad):
    with pytest.raises(TypeError, match="sigma must be a number"):
        activation_gain("relu", bad)


def test_bad_names_and_slopes():
    with pytest.raises(TypeError, match="name must be a string, got None"):
        activation_gain(None)
    with pytest.raises(ValueError, match="prelu and leaky_relu only; relu has none"):
        activation_gain("relu", slope=0.1)
    with pytest.raises(TypeError, match="slope must be a number, got '0.1'"):
        activation_gain("prelu", slope="0.1")
    with pytest.raises(ValueError, match="slope must be from -1e\\+100 to 1e\\+100, got nan"):
        activation_gain("prelu", slope=float("nan"))


def test_importing_needs_neither_scipy_nor_torch():
    script = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['scipy'] = None\n"
        f"runpy.run_path({sys.modules[ActivationGain.__module__].__file__!r}, run_name='gains')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
