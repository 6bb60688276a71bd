import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gnpractical.layers import standardized_weight
from gnpractical.layers.standardized_weight import standardize_weight, standardized_weight_of
from gnpractical.layers.weight_standardization import (
    WSConv2d,
    fold_weight_standardization,
    standardized_once,
)


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


def gradient_of(conv, inputs):
    """Of the summed squares of the outputs, by the reference's weight."""
    weight = conv.weight.detach().clone().requires_grad_()
    outputs = [nn.functional.conv2d(x, naive(weight), conv.bias) for x in inputs]
    sum(out.square().sum() for out in outputs).backward()
    return weight.grad


def loss_of(conv, x):
    return conv(x).square().sum()


@pytest.fixture
def conv():
    return WSConv2d(3, 4, 3).double()


@pytest.fixture
def inputs():
    return [torch.randn(1, 3, size, size).double() for size in (5, 7, 9)]


@pytest.fixture
def computed(monkeypatch):
    """The weights that were standardized, one entry for each time."""
    weights = []
    original = standardized_weight._standardize

    def count(weight, *args):
        weights.append(weight)
        return original(weight, *args)

    monkeypatch.setattr(standardized_weight, "_standardize", count)
    return weights


def test_a_shared_convolution_is_standardized_once_a_step(conv, inputs, computed):
    for steps in (1, 2, 3):
        conv.weight.grad = None
        sum(loss_of(conv, x) for x in inputs).backward()
        assert len(computed) == steps
        torch.testing.assert_close(conv.weight.grad, gradient_of(conv, inputs))
        with torch.no_grad():
            conv.weight.sub_(0.1 * torch.randn_like(conv.weight))


def test_memory_is_kept_from_step_to_step(conv, inputs):
    places = set()
    for _ in range(3):
        weight = standardized_weight_of(conv, conv.weight)
        places.add(weight.data_ptr())
        weight.square().sum().backward()
        del weight
        with torch.no_grad():
            conv.weight.mul_(0.9)
    assert len(places) == 1


@pytest.mark.parametrize("order", ["aAbB", "abAB", "abBA", "abAcBC", "aAbBcC", "abcCBA"])
def test_losses_one_after_the_other_in_any_order(conv, inputs, order):
    losses = {}
    for event in order:  # a lower case letter is a forward, the upper case one its backward
        i = "abc".index(event.lower())
        if event.islower():
            losses[i] = loss_of(conv, inputs[i])
        else:
            losses[i].backward()
    torch.testing.assert_close(conv.weight.grad, gradient_of(conv, [inputs[i] for i in losses]))


def test_a_step_between_forward_and_backward_is_an_error(conv, inputs):
    loss = loss_of(conv, inputs[0])
    with torch.no_grad():
        conv.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = loss_of(conv, inputs[0])
    with torch.no_grad():
        conv.weight.mul_(1.1)
    loss_of(conv, inputs[1]).backward()  # overwrites what the first loss needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_validation_between_forward_and_backward(conv, inputs):
    loss = loss_of(conv, inputs[0])
    conv.eval()
    with torch.no_grad():
        conv(inputs[1])
    conv.train()
    loss.backward()
    torch.testing.assert_close(conv.weight.grad, gradient_of(conv, inputs[:1]))


def rewrite_in_place(conv):
    with torch.no_grad():
        conv.weight.copy_(torch.randn_like(conv.weight))


def rewrite_by_state_dict(conv):
    conv.load_state_dict({**conv.state_dict(), "weight": torch.randn_like(conv.weight)})


def rewrite_by_assignment(conv):
    state = {**conv.state_dict(), "weight": torch.randn_like(conv.weight)}
    conv.load_state_dict(state, assign=True)


def rewrite_by_new_data(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def rewrite_through_data(conv):
    conv.weight.data.copy_(torch.randn_like(conv.weight))


def rewrite_through_numpy(conv):
    conv.weight.detach().numpy()[...] = torch.randn(conv.weight.shape).numpy()


def change_the_dtype(conv):
    conv.float()


SEEN = [rewrite_in_place, rewrite_by_state_dict, rewrite_by_assignment, rewrite_by_new_data,
        change_the_dtype]  # fmt: skip
NOT_COUNTED = [rewrite_through_data, rewrite_through_numpy]


def output_of(conv, x):
    return nn.functional.conv2d(x.to(conv.weight.dtype), naive(conv.weight), conv.bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rewrite", SEEN + NOT_COUNTED)
def test_every_change_of_the_weight_is_seen(conv, inputs, rewrite, trained, mode):
    conv.requires_grad_(trained)
    x = inputs[0].requires_grad_()
    for _ in range(3):
        with mode():
            conv(x.to(conv.weight.dtype))
        with torch.no_grad():
            rewrite(conv)
        with mode():
            torch.testing.assert_close(conv(x.to(conv.weight.dtype)), output_of(conv, x))


def test_a_step_that_pytorch_does_not_count_while_another_loss_waits(conv, inputs):
    first, second = loss_of(conv, inputs[0]), loss_of(conv, inputs[1])
    first.backward()
    rewrite_through_data(conv)
    torch.testing.assert_close(conv(inputs[2]), output_of(conv, inputs[2]))
    assert second.requires_grad  # and its graph is still there


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers(conv, inputs, optimizer, kept):
    optimizer = optimizer(conv.parameters(), lr=0.1, fused=True)
    for x in inputs:
        optimizer.zero_grad()
        loss_of(conv, x).backward()
        logged = conv(x) if kept else conv(x).detach()  # between backward and step
        optimizer.step()
        torch.testing.assert_close(conv(x), output_of(conv, x))
        del logged


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rewrite", SEEN)
def test_standardized_once_until_the_weight_changes(conv, inputs, computed, rewrite, mode):
    with standardized_once(nn.Sequential(conv)), mode():
        for x in inputs:
            torch.testing.assert_close(conv(x), output_of(conv, x))
        assert len(computed) == 1
        with torch.no_grad():
            rewrite(conv)
        x = inputs[0].to(conv.weight.dtype)
        torch.testing.assert_close(conv(x), output_of(conv, x))
    assert len(computed) == 2
    with mode():
        conv(x)
    assert len(computed) == 3


def test_training_while_standardized_once(conv, inputs):
    with torch.inference_mode(), standardized_once(conv):
        conv(inputs[0])
        with torch.inference_mode(False):
            loss_of(conv, inputs[0]).backward()
    torch.testing.assert_close(conv.weight.grad, gradient_of(conv, inputs[:1]))


@pytest.mark.parametrize("trained", [False, True])
def test_threads(inputs, trained):
    conv = WSConv2d(64, 64, 3)  # large enough that they meet
    x = torch.randn(1, 64, 8, 8)
    expected = output_of(conv, x)
    gradient = torch.autograd.grad(loss_of(conv, x), conv.weight)[0]

    def run(_):
        if trained:
            return torch.autograd.grad(loss_of(conv, x), conv.weight)[0]
        with torch.no_grad():
            return conv(x)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, range(200)):
            torch.testing.assert_close(
                result, gradient if trained else expected, rtol=1e-3, atol=1e-2
            )


def test_nothing_is_left_of_a_fake_forward(conv, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        conv(mode.from_tensor(inputs[0]))
    torch.testing.assert_close(conv(inputs[0]), output_of(conv, inputs[0]))


def test_exported_with_gradients(conv, inputs):
    exported = torch.export.export(conv, (inputs[0],)).module()
    out = exported(inputs[0])
    torch.testing.assert_close(out, output_of(conv, inputs[0]))
    assert out.requires_grad


def test_from_validation_to_training_and_back(conv, inputs):
    with torch.no_grad():
        before = conv(inputs[0])
    loss_of(conv, inputs[0]).backward()
    torch.testing.assert_close(conv.weight.grad, gradient_of(conv, inputs[:1]))
    with torch.no_grad():
        torch.testing.assert_close(conv(inputs[0]), before)
    with torch.inference_mode():
        torch.testing.assert_close(conv(inputs[0]), before)


def test_channels_last_weights(conv, inputs):
    conv = conv.to(memory_format=torch.channels_last)
    x = inputs[0].contiguous(memory_format=torch.channels_last)
    weight = standardized_weight_of(conv, conv.weight)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    loss_of(conv, x).backward()
    torch.testing.assert_close(conv.weight.grad, gradient_of(conv, [x]))


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0)])
def test_weights_in_any_order_of_memory(inputs, order):
    conv = WSConv2d(3, 3, 3).double()
    conv.weight = nn.Parameter(torch.randn(3, 3, 3, 3).double().permute(order))
    for _ in range(2):
        conv.weight.grad = None
        torch.testing.assert_close(conv(inputs[0]), output_of(conv, inputs[0]))
        loss_of(conv, inputs[0]).backward()
        torch.testing.assert_close(conv.weight.grad, gradient_of(conv, inputs[:1]))
    torch.testing.assert_close(standardize_weight(conv.weight), naive(conv.weight))


def test_a_gradient_that_is_not_laid_out_as_the_weight(conv):
    grad = torch.randn(4, 3, 3, 3).double().contiguous(memory_format=torch.channels_last)
    kept = grad.clone()
    weight = standardize_weight(conv.weight)
    weight.backward(grad)
    expected = torch.autograd.grad(naive(conv.weight), conv.weight, kept)[0]
    torch.testing.assert_close(conv.weight.grad, expected)
    assert torch.equal(grad, kept)


def test_weights_that_are_no_parameters(conv, inputs):
    weight = torch.randn(4, 3, 3, 3).double()
    out = torch.func.functional_call(conv, {"weight": weight}, inputs[0])
    torch.testing.assert_close(out, nn.functional.conv2d(inputs[0], naive(weight), conv.bias))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(conv, inputs, use_reentrant):
    x = inputs[0].requires_grad_()
    out = checkpoint(lambda x: conv(conv(x).narrow(1, 0, 3)), x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    kept, conv.weight.grad = conv.weight.grad, None
    conv(conv(x).narrow(1, 0, 3)).square().sum().backward()
    torch.testing.assert_close(kept, conv.weight.grad)


def test_nothing_is_kept_of_a_convolution_that_is_gone(inputs):
    conv = WSConv2d(3, 4, 3).double()
    loss_of(conv, inputs[0])
    copy.deepcopy(conv)
    pickle.loads(pickle.dumps(conv))
    kept = weakref.ref(standardized_weight._KEPT[conv])
    del conv
    assert kept() is None


def test_folding(conv, inputs):
    model = nn.ModuleList([conv, WSConv2d(3, 4, 3).double()])
    model[1].weight = conv.weight  # shared: to be standardized once
    expected = [layer(inputs[0]) for layer in model]
    assert fold_weight_standardization(model) == 2
    assert [type(layer) for layer in model] == [nn.Conv2d] * 2
    assert conv not in standardized_weight._KEPT
    for layer, out in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(inputs[0]), out)


def test_folding_what_it_does_not_know_changes_nothing(conv):
    class Other(WSConv2d):
        pass

    weight = conv.weight.detach().clone()
    with pytest.raises(TypeError, match="got a Other"):
        fold_weight_standardization(nn.Sequential(conv, Other(3, 4, 3)))
    assert type(conv) is WSConv2d and torch.equal(conv.weight, weight)
