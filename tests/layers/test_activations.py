import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical.activation_gain import ACTIVATIONS, activation_gain
from gnpractical.layers.activations import ACTIVATION_FUNCTIONS, gain_of

MODULES = [
    nn.ReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.LogSigmoid, nn.Identity, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish,
    nn.CELU, nn.Hardtanh, nn.Hardsigmoid,
]  # fmt: skip
PRELU = (F.prelu, torch.prelu, torch.Tensor.prelu)


def assert_measured(gain, function, sigma):
    """Compare with sums over a grid, of the function's own values and autograd's derivatives."""
    z = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 10_000 - 10
    weights = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) / 10_000
    x = (sigma * z).requires_grad_()
    y = function(x * 1)  # "* 1": the in-place variants may not write to a leaf
    (derivative,) = torch.autograd.grad(y.sum(), x)
    assert gain.forward == pytest.approx((weights @ y.square()).item() / sigma**2, rel=1e-4)
    assert gain.backward == pytest.approx((weights @ derivative.square()).item(), rel=1e-4)


@pytest.mark.parametrize("sigma", [0.5, 3])
@pytest.mark.parametrize("function", ACTIVATION_FUNCTIONS, ids=lambda f: str(f)[:40])
def test_every_function_against_itself(function, sigma):
    call = function
    if function in PRELU:
        call = functools.partial(function, weight=torch.tensor(0.25, dtype=torch.float64))
        if function is torch.Tensor.prelu:
            call = lambda x: x.prelu(torch.tensor(0.25, dtype=torch.float64))  # noqa: E731
    assert_measured(gain_of(function, sigma), call, sigma)


@pytest.mark.parametrize("sigma", [0.5, 3])
@pytest.mark.parametrize(
    "module",
    [cls() for cls in MODULES]
    + [
        nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.5), nn.PReLU(init=0.6),
        nn.GELU(approximate="tanh"),
    ],
    ids=str,
)  # fmt: skip
def test_every_module_against_itself(module, sigma):
    assert_measured(gain_of(module, sigma), module.double(), sigma)


def test_classes_are_their_default_instances():
    assert [gain_of(cls, 2.0) for cls in MODULES] == [gain_of(cls(), 2.0) for cls in MODULES]


def test_every_name_is_reached():
    # identity has no function, gelu_tanh is an argument of gelu
    assert set(ACTIVATION_FUNCTIONS.values()) == set(ACTIVATIONS) - {"identity", "gelu_tanh"}


def test_the_approximation_of_gelu_is_told_apart():
    exact, approximate = gain_of(nn.GELU()), gain_of(nn.GELU("tanh"))
    assert exact == activation_gain("gelu") != approximate == activation_gain("gelu_tanh")


def test_prelu_with_a_slope_per_channel_averages_the_gains():
    module = nn.PReLU(2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, -1.5]))
    gain = gain_of(module)
    assert gain.forward == pytest.approx(((1 + 0.25) / 2 + (1 + 2.25) / 2) / 2)
    assert gain.ratio == pytest.approx(1)


def test_a_derived_module_counts_while_it_inherits_forward():
    class Named(nn.LeakyReLU):
        pass

    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) - 1

    assert gain_of(Named(0.2)) == activation_gain("leaky_relu", slope=0.2)
    with pytest.raises(ValueError, match="no known gain for Shifted"):
        gain_of(Shifted())


@pytest.mark.parametrize(
    "module, expected",
    [
        (nn.ELU(alpha=2), r"ELU\(alpha=2\): only alpha=1 is covered, got 2"),
        (nn.CELU(alpha=0.5), "only alpha=1 is covered, got 0.5"),
        (nn.Softplus(beta=2), "only beta=1 "),
        (nn.Softplus(threshold=1), "only threshold=20 "),
        (nn.Hardtanh(-2, 1), "only min_val=-1 "),
        (nn.Hardtanh(-1, 2), "only max_val=1 "),
    ],
)
def test_parameters_that_are_not_covered(module, expected):
    with pytest.raises(ValueError, match=expected):
        gain_of(module)


@pytest.mark.parametrize(
    "unknown",
    [nn.Conv2d(1, 1, 1), nn.Softmax(dim=1), nn.Softmax, F.softmax, abs, "relu", None, [F.relu]],
)
def test_unknown(unknown):
    with pytest.raises(ValueError, match="no known gain for .*nn.ReLU, nn.PReLU") as error:
        gain_of(unknown)
    assert repr(unknown) in str(error.value)


def test_sigma_is_checked():
    with pytest.raises(ValueError, match="sigma"):
        gain_of(F.relu, 0)
