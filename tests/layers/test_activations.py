import functools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import nn

from gnpractical.activation_gain import ACTIVATIONS, activation_gain
from gnpractical.layers.activations import ACTIVATION_FUNCTIONS, gain_of

MODULES = [
    nn.ReLU,
    nn.PReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.SELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Identity,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Mish,
    nn.CELU,
    nn.Hardtanh,
    nn.Hardsigmoid,
]
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
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.3),
        nn.LeakyReLU(-0.5),
        nn.PReLU(init=0.6),
        nn.ELU(alpha=0.5),
        nn.CELU(alpha=2),
        nn.Softplus(beta=2, threshold=1),
        nn.Hardtanh(-2, 0.995),
        nn.GELU(approximate="tanh"),
    ],
    ids=str,
)
def test_every_module_against_itself(module, sigma):
    assert_measured(gain_of(module, sigma), module.double(), sigma)


def test_classes_are_their_default_instances():
    assert [gain_of(cls, 2.0) for cls in MODULES] == [gain_of(cls(), 2.0) for cls in MODULES]


def test_every_name_is_reached():
    # identity has no function, gelu_tanh is an argument of gelu
    assert set(ACTIVATION_FUNCTIONS.values()) == set(ACTIVATIONS) - {"identity", "gelu_tanh"}


def test_variants_of_a_function_have_its_name():
    sigmoid = {torch.sigmoid, torch.sigmoid_, torch.special.expit, F.sigmoid}
    sigmoid |= {torch.Tensor.sigmoid, torch.Tensor.sigmoid_}
    assert {f for f, name in ACTIVATION_FUNCTIONS.items() if name == "sigmoid"} == sigmoid
    assert ACTIVATION_FUNCTIONS[F.leaky_relu_] == "leaky_relu"
    assert F.softmax not in ACTIVATION_FUNCTIONS


@pytest.mark.parametrize("module", [nn.GELU, nn.Tanh, nn.PReLU, nn.Hardtanh], ids=str)
def test_modules_have_the_gains_of_their_names(module):
    assert gain_of(module, 3.0) == activation_gain(module.__name__.lower(), 3.0)


def test_prelu_with_a_slope_per_channel_averages_the_gains():
    module = nn.PReLU(2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, -1.5]))
    gain = gain_of(module)
    assert gain.forward == pytest.approx(((1 + 0.25) / 2 + (1 + 2.25) / 2) / 2, rel=1e-4)
    assert gain.ratio == pytest.approx(1, rel=1e-4)


def test_any_element_wise_function_can_be_integrated():
    class Shifted(nn.PReLU):
        def forward(self, x):
            return super().forward(x) - 1

    assert_measured(gain_of(Shifted()), Shifted().double(), 1)
    assert_measured(gain_of(torch.sin, 2), torch.sin, 2)
    assert gain_of(nn.Threshold(0.3, -1)).backward == pytest.approx(ndtr(-0.3), rel=1e-4)


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.PReLU(init=0.5), nn.Dropout(), nn.ReLU(inplace=True))
    assert gain_of(module).forward == pytest.approx(1 / 2, rel=1e-4)
    assert module[0].weight.dtype == torch.float32 and module[0].weight.grad is None
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize(
    "unknown", [nn.Conv2d(1, 1, 1), nn.Linear(2, 2), nn.BatchNorm2d(4), nn.Softmax(1), nn.GLU]
)
def test_modules_that_are_no_activation(unknown):
    with pytest.raises(ValueError, match="element-wise"):
        gain_of(unknown)


@pytest.mark.parametrize("unknown", ["relu", None, [F.relu]])
def test_what_cannot_be_called(unknown):
    with pytest.raises(TypeError, match="must be a module, a class or a function") as error:
        gain_of(unknown)
    assert repr(unknown) in str(error.value)


def test_sigma_is_checked():
    with pytest.raises(ValueError, match="sigma"):
        gain_of(F.relu, 0)
