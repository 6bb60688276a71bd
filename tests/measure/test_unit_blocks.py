"""What belongs to a unit block: its layer, its activation, and who else reads what."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import measure_gradient_variance


def ratio_of(forward, *layers):
    """K of the first norm of a module with that forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return forward(self.layers, x)

    torch.manual_seed(2)
    (row, *_) = measure_gradient_variance(
        Net(), [torch.randn(4, 8, 6, 6)], lambda m, b: m(b).pow(3).sum()
    )
    return row


def conv_and_norm():
    torch.manual_seed(3)
    return nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)


def test_an_activation_counts_only_if_nothing_else_reads_the_norm():
    plain = ratio_of(lambda m, x: m[1](m[0](x)) * 1.0, *conv_and_norm())
    assert plain.activation is None
    swish = ratio_of(lambda m, x: (z := m[1](m[0](x))) * torch.sigmoid(z), *conv_and_norm())
    before = ratio_of(lambda m, x: (z := m[1](m[0](x))) * 1.0 + F.relu(z), *conv_and_norm())
    square = ratio_of(lambda m, x: (z := m[1](m[0](x))) * z, *conv_and_norm())
    for row in (swish, before, square):
        assert row.activation is None and row.ratio is not None
    # The same function, of a copy: at the norm's output the gradient is the same.
    copied = ratio_of(lambda m, x: (z := m[1](m[0](x)) * 1.0) * torch.sigmoid(z), *conv_and_norm())
    assert swish.ratio == pytest.approx(copied.ratio, rel=1e-4)
    silu = ratio_of(lambda m, x: F.silu(m[1](m[0](x))), *conv_and_norm())
    assert silu.activation == "silu" and silu.ratio != pytest.approx(swish.ratio)


def test_the_layer_is_the_one_whose_output_the_norm_got():
    """Registered conv, conv, norm, norm: by structure each norm would follow the second conv."""
    (conv1, norm1), (conv2, norm2) = conv_and_norm(), conv_and_norm()

    def forward(m, x):
        return m[3](m[1](F.relu(m[2](m[0](x)))))

    mixed = ratio_of(forward, conv1, conv2, norm1, norm2)
    ordered = ratio_of(lambda m, x: m[3](m[2](F.relu(m[1](m[0](x))))), conv1, norm1, conv2, norm2)
    assert mixed.layer == "layers.0"
    assert mixed.ratio == pytest.approx(ordered.ratio, rel=1e-5)


def test_all_calls_of_the_layer_before_all_calls_of_the_norm():
    def forward(m, x):
        ys = [m[0](part) for part in x.split(2)]
        return torch.cat([F.relu(m[1](y)) for y in ys])

    at_once = ratio_of(lambda m, x: F.relu(m[1](m[0](x))), *conv_and_norm())
    assert ratio_of(forward, *conv_and_norm()).ratio == pytest.approx(at_once.ratio, rel=1e-4)


def test_inputs_by_keyword():
    by_place = ratio_of(lambda m, x: F.relu(m[1](m[0](x))), *conv_and_norm())
    by_name = ratio_of(lambda m, x: F.relu(m[1](input=m[0](input=x))), *conv_and_norm())
    assert by_name.ratio == pytest.approx(by_place.ratio)


@pytest.mark.parametrize("in_a_list", [False, True])
def test_a_reader_in_a_list_is_a_reader(in_a_list):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 32, 3), nn.GroupNorm(4, 32)
            self.out = nn.Conv2d(32, 32, 1)

        def forward(self, x):
            z = self.norm(self.conv(x))
            a = self.out(torch.relu(z))
            again = torch.stack([z, a])[0] if in_a_list else z * 1
            return (0.01 * a + again).pow(3).sum()

    (block,) = measure_gradient_variance(Model(), [torch.randn(4, 4, 8, 8)])
    assert block.activation is None and block.ratio < 100
