"""The standardized weight and its gradient: the right values, everywhere a convolution runs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gnpractical import PracticalGroupNorm, convert
from gnpractical.layers.weight_standardization import (
    Standardized,
    WSConv2d,
    fold_weight_standardization,
    standardize_layer,
    standardize_weight,
)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (8, 16, 1, 1), (5, 6, 1, 1)])
@pytest.mark.parametrize("scale", [0.01, 0.03, 5.0])
def test_equals_the_formula_of_the_authors_but_for_where_eps_sits(shape, scale, reference):
    weight = torch.randn(shape, dtype=torch.double) * scale + 0.3 * scale
    std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    out, expected = standardize_weight(weight), reference.weight(weight, eps=1e-5)
    torch.testing.assert_close(out, expected * (1 + 1e-5 / std), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (8, 16, 1, 1), (5, 6, 1, 1)])
@pytest.mark.parametrize("scale", [0.03, 5.0])
def test_gradient(shape, scale, reference):
    weight = (torch.randn(shape, dtype=torch.double) * scale + 0.3 * scale).requires_grad_()
    grad = torch.randn(shape, dtype=torch.double)
    torch.testing.assert_close(
        torch.autograd.grad(standardize_weight(weight), weight, grad)[0],
        torch.autograd.grad(reference.weight(weight), weight, grad)[0],
        rtol=1e-5,
        atol=1e-5 / scale,
    )


def test_a_following_norm_removes_the_difference_to_the_reference(reference):
    conv, norm = WSConv2d(64, 32, 3), PracticalGroupNorm(32, rule=32)
    x = torch.randn(2, 64, 9, 9)
    expected = nn.functional.conv2d(x, reference.weight(conv.weight, eps=1e-5), conv.bias)
    torch.testing.assert_close(norm(conv(x)), norm(expected), rtol=1e-4, atol=1e-4)


def test_gradcheck():
    weight = torch.randn(3, 2, 2, 2, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(standardize_weight, (weight,))
    assert torch.autograd.gradgradcheck(standardize_weight, (weight,))


def test_float32_is_close_to_float64(reference):
    weight = torch.randn(16, 32, 3, 3)
    expected = reference.weight(weight.double())
    torch.testing.assert_close(standardize_weight(weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_conv_equals_plain_conv_with_the_reference_weight(convolution):
    plain = convolution(6, 4, 3, padding=1, stride=2, groups=2)
    conv = copy.deepcopy(plain)
    assert standardize_layer(conv) and isinstance(conv, convolution)
    x = torch.randn(2, 6, *plain.kernel_size).repeat_interleave(3, dim=2)
    with torch.no_grad():
        filters = plain.weight.flatten(1)
        filters.copy_((filters - filters.mean(1, keepdim=True)) / filters.std(1, keepdim=True))
    torch.testing.assert_close(conv(x), plain(x))
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert fold_weight_standardization(nn.Sequential(conv)) == 1 and type(conv) is convolution
    torch.testing.assert_close(conv(x), plain(x))


@pytest.mark.parametrize("groups", [1, 2, 8])  # with 8 each filter has one input channel
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_converted_models_convolve_with_the_written_out_weight(dim, groups):
    convolution, norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
    model = nn.Sequential(
        convolution(8, 16, 3, padding=1, groups=groups), norm(16), nn.ReLU(), convolution(16, 4, 1)
    ).double()
    x = torch.randn(2, 8, *[5] * dim).double()
    with torch.no_grad():  # of deviations beside which eps is nothing
        weight = nn.init.normal_(model[0].weight).clone().requires_grad_()

    filters = weight.flatten(1)
    centered = filters - filters.sum(1, keepdim=True) / filters.shape[1]
    variance = centered.square().sum(1, keepdim=True) / (filters.shape[1] - 1)
    standardized = (centered / variance.sqrt()).view_as(weight)
    conv = getattr(nn.functional, f"conv{dim}d")
    y = conv(x, standardized, model[0].bias, padding=1, groups=groups)
    expected = model[3](nn.functional.group_norm(y, 4).relu())
    gradient = torch.autograd.grad(expected.square().sum(), weight)[0]

    convert(model, x, rule=4, weight_standardization=True)
    assert isinstance(model[0], Standardized) and type(model[3]) is convolution
    out = model(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, gradient)
    assert fold_weight_standardization(model) == 1 and type(model[0]) is convolution
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(3, 4, 3), nn.Linear(3, 4), nn.Conv3d(1, 4, 1)]
)
def test_layers_that_cannot_be_standardized(layer):
    assert not standardize_layer(layer) and not isinstance(layer, Standardized)


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


def test_exported_with_gradients(conv, inputs, reference):
    exported = torch.export.export(conv, (inputs[0],)).module()
    out = exported(inputs[0])
    torch.testing.assert_close(out, reference.output(conv, inputs[0]))
    assert out.requires_grad


def test_channels_last_weights(conv, inputs, reference):
    conv = conv.to(memory_format=torch.channels_last)
    x = inputs[0].contiguous(memory_format=torch.channels_last)
    reference.loss(conv, x).backward()
    torch.testing.assert_close(conv.weight.grad, reference.gradient(conv, [x]))


def test_weights_that_are_no_parameters(conv, inputs, reference):
    weight = torch.randn(4, 3, 3, 3).double()
    out = torch.func.functional_call(conv, {"weight": weight}, inputs[0])
    torch.testing.assert_close(
        out, nn.functional.conv2d(inputs[0], reference.weight(weight), conv.bias)
    )


def test_folding(conv, inputs):
    model = nn.ModuleList([conv, WSConv2d(3, 4, 3).double()])
    model[1].weight = conv.weight  # shared: to be standardized once
    expected = [layer(inputs[0]) for layer in model]
    assert fold_weight_standardization(model) == 2
    assert [type(layer) for layer in model] == [nn.Conv2d] * 2
    for layer, out in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(inputs[0]), out)


def test_folding_what_it_does_not_know_changes_nothing(conv):
    class Other(WSConv2d):
        pass

    weight = conv.weight.detach().clone()
    with pytest.raises(TypeError, match="got '1', a Other"):
        fold_weight_standardization(nn.Sequential(conv, Other(3, 4, 3)))
    assert type(conv) is WSConv2d and torch.equal(conv.weight, weight)


def test_per_sample_gradients_by_torch_func(conv, reference):
    x = torch.randn(5, 3, 6, 6).double()

    def loss(parameters, sample):
        return torch.func.functional_call(conv, parameters, sample[None]).square().sum()

    parameters = {name: p.detach() for name, p in conv.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]
    for sample, gradient in zip(x, per_sample, strict=True):
        torch.testing.assert_close(gradient, reference.gradient(conv, [sample[None]]))


@pytest.mark.filterwarnings("ignore")
def test_traced(conv, inputs):
    traced = torch.jit.trace(conv, inputs[0])
    torch.testing.assert_close(traced(inputs[1]), conv(inputs[1]))
    with torch.no_grad():
        conv.weight.mul_(-1)  # the weight is standardized at each call
    torch.testing.assert_close(traced(inputs[1]), conv(inputs[1]))


def test_every_change_of_the_weight_counts_in_evaluation_too(conv, inputs, reference):
    conv.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(conv(inputs[0]), reference.output(conv, inputs[0]))
            conv.weight.data = torch.randn_like(conv.weight)


def test_weights_that_others_use_or_make_anew_are_not_folded(conv):
    plain = nn.Conv2d(3, 4, 3)
    plain.weight = conv.weight
    pruned = WSConv2d(3, 4, 3)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    for model in (nn.Sequential(conv, plain), nn.Sequential(pruned)):
        with pytest.raises(TypeError, match="no other layer's; got"):
            fold_weight_standardization(model)
        assert isinstance(model[0], WSConv2d)
