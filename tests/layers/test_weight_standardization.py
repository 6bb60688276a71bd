import pytest
import torch
from torch import nn

from gnpractical.layers.weight_standardization import WSConv2d, standardize_weight


def naive(weight, eps=1e-5):
    """The reference: mean out, divided by the unbiased std plus eps."""
    centered = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    std = centered.flatten(1).std(dim=1).view(-1, 1, 1, 1) + eps
    return centered / std


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (8, 16, 1, 1), (5, 2, 1, 1)])
@pytest.mark.parametrize("scale", [1e-4, 0.03, 5.0])
def test_equals_the_reference_and_its_gradient(shape, scale):
    weight = (torch.randn(shape, dtype=torch.double) * scale + 0.3 * scale).requires_grad_()
    grad = torch.randn(shape, dtype=torch.double)
    out, expected = standardize_weight(weight), naive(weight)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(out, weight, grad)[0],
        torch.autograd.grad(expected, weight, grad)[0],
        rtol=1e-7,
        atol=1e-7 / scale,
    )


def test_gradcheck():
    weight = (torch.randn(3, 2, 2, 2, dtype=torch.double) * 0.01).requires_grad_()
    assert torch.autograd.gradcheck(standardize_weight, (weight,))


def test_float32_is_close_to_float64():
    weight = torch.randn(16, 32, 3, 3) * 0.03
    torch.testing.assert_close(
        standardize_weight(weight).double(), naive(weight.double()), rtol=1e-5, atol=1e-5
    )


def test_conv_equals_plain_conv_with_the_reference_weight():
    conv = WSConv2d(6, 4, 3, padding=1, stride=2, groups=2)
    x = torch.randn(2, 6, 9, 9)
    expected = nn.functional.conv2d(x, naive(conv.weight), conv.bias, 2, 1, groups=2)
    torch.testing.assert_close(conv(x), expected)
    assert list(conv.state_dict()) == ["weight", "bias"]


def test_float32_inside_under_autocast():
    conv = WSConv2d(64, 8, 3)
    # Large mean: rounded to bfloat16 first, the deviations would be lost.
    with torch.no_grad():
        conv.weight.mul_(1e-3).add_(1.0)
    x = torch.randn(1, 64, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), conv(x), rtol=0.05, atol=0.5)
    assert conv.weight.grad.dtype == torch.float32
    assert torch.isfinite(conv.weight.grad).all()


def test_half_weights_keep_their_dtype():
    assert standardize_weight(torch.randn(4, 8, 1, 1).half()).dtype == torch.half


def test_constant_filter_is_zero_and_its_gradient_finite():
    weight = torch.full((2, 3, 3, 3), 0.7, requires_grad=True)
    out = standardize_weight(weight)
    assert out.abs().max() < 0.01  # the rounding of the mean, over eps
    out.sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_filters_of_one_value_are_refused():
    with pytest.raises(ValueError, match="at least two values.*4, 1, 1, 1"):
        standardize_weight(torch.randn(4, 1, 1, 1))


def test_survives_torch_compile():
    conv = WSConv2d(4, 4, 3)
    x = torch.randn(1, 4, 6, 6)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x))
