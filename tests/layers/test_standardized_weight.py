"""How often a weight is standardized, and that no change of it is missed."""

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
from gnpractical.layers.standardized_weight import standardized_weight_of
from gnpractical.layers.weight_standardization import WSConv2d, standardized_once


def test_a_shared_convolution_is_standardized_once_a_step(conv, inputs, computed, reference):
    for steps in (1, 2, 3):
        conv.weight.grad = None
        sum(reference.loss(conv, x) for x in inputs).backward()
        assert len(computed) == steps
        torch.testing.assert_close(conv.weight.grad, reference.gradient(conv, inputs))
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
def test_losses_one_after_the_other_in_any_order(conv, inputs, order, reference):
    losses = {}
    for event in order:  # a lower case letter is a forward, the upper case one its backward
        i = "abc".index(event.lower())
        if event.islower():
            losses[i] = reference.loss(conv, inputs[i])
        else:
            losses[i].backward()
    torch.testing.assert_close(
        conv.weight.grad, reference.gradient(conv, [inputs[i] for i in losses])
    )


def test_a_step_between_forward_and_backward_is_an_error(conv, inputs, reference):
    loss = reference.loss(conv, inputs[0])
    with torch.no_grad():
        conv.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = reference.loss(conv, inputs[0])
    with torch.no_grad():
        conv.weight.mul_(1.1)
    reference.loss(conv, inputs[1]).backward()  # overwrites what the first loss needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_validation_between_forward_and_backward(conv, inputs, reference):
    loss = reference.loss(conv, inputs[0])
    conv.eval()
    with torch.no_grad():
        conv(inputs[1])
    conv.train()
    loss.backward()
    torch.testing.assert_close(conv.weight.grad, reference.gradient(conv, inputs[:1]))


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rewrite", SEEN + NOT_COUNTED)
def test_every_change_of_the_weight_is_seen(conv, inputs, rewrite, trained, mode, reference):
    conv.requires_grad_(trained)
    x = inputs[0].requires_grad_()
    for _ in range(3):
        with mode():
            conv(x.to(conv.weight.dtype))
        with torch.no_grad():
            rewrite(conv)
        with mode():
            torch.testing.assert_close(conv(x.to(conv.weight.dtype)), reference.output(conv, x))


def test_a_step_that_pytorch_does_not_count_while_another_loss_waits(conv, inputs, reference):
    first, second = reference.loss(conv, inputs[0]), reference.loss(conv, inputs[1])
    first.backward()
    rewrite_through_data(conv)
    torch.testing.assert_close(conv(inputs[2]), reference.output(conv, inputs[2]))
    assert second.requires_grad  # and its graph is still there


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers(conv, inputs, optimizer, kept, reference):
    optimizer = optimizer(conv.parameters(), lr=0.1, fused=True)
    for x in inputs:
        optimizer.zero_grad()
        reference.loss(conv, x).backward()
        logged = conv(x) if kept else conv(x).detach()  # between backward and step
        optimizer.step()
        torch.testing.assert_close(conv(x), reference.output(conv, x))
        del logged


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rewrite", SEEN)
def test_standardized_once_until_the_weight_changes(
    conv, inputs, computed, rewrite, mode, reference
):
    with standardized_once(nn.Sequential(conv)), mode():
        for x in inputs:
            torch.testing.assert_close(conv(x), reference.output(conv, x))
        assert len(computed) == 1
        with torch.no_grad():
            rewrite(conv)
        x = inputs[0].to(conv.weight.dtype)
        torch.testing.assert_close(conv(x), reference.output(conv, x))
    assert len(computed) == 2
    with mode():
        conv(x)
    assert len(computed) == 3


def test_training_while_standardized_once(conv, inputs, reference):
    with torch.inference_mode(), standardized_once(conv):
        conv(inputs[0])
        with torch.inference_mode(False):
            reference.loss(conv, inputs[0]).backward()
    torch.testing.assert_close(conv.weight.grad, reference.gradient(conv, inputs[:1]))


@pytest.mark.parametrize("trained", [False, True])
def test_threads(inputs, trained, reference):
    conv = WSConv2d(64, 64, 3)  # large enough that they meet
    x = torch.randn(1, 64, 8, 8)
    expected = reference.output(conv, x)
    gradient = torch.autograd.grad(reference.loss(conv, x), conv.weight)[0]

    def run(_):
        if trained:
            return torch.autograd.grad(reference.loss(conv, x), conv.weight)[0]
        with torch.no_grad():
            return conv(x)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, range(200)):
            torch.testing.assert_close(
                result, gradient if trained else expected, rtol=1e-3, atol=1e-2
            )


def test_nothing_is_left_of_a_fake_forward(conv, inputs, reference):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        conv(mode.from_tensor(inputs[0]))
    torch.testing.assert_close(conv(inputs[0]), reference.output(conv, inputs[0]))


def test_from_validation_to_training_and_back(conv, inputs, reference):
    with torch.no_grad():
        before = conv(inputs[0])
    reference.loss(conv, inputs[0]).backward()
    torch.testing.assert_close(conv.weight.grad, reference.gradient(conv, inputs[:1]))
    with torch.no_grad():
        torch.testing.assert_close(conv(inputs[0]), before)
    with torch.inference_mode():
        torch.testing.assert_close(conv(inputs[0]), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(conv, inputs, use_reentrant):
    x = inputs[0].requires_grad_()
    out = checkpoint(lambda x: conv(conv(x).narrow(1, 0, 3)), x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    kept, conv.weight.grad = conv.weight.grad, None
    conv(conv(x).narrow(1, 0, 3)).square().sum().backward()
    torch.testing.assert_close(kept, conv.weight.grad)


def test_nothing_is_kept_of_a_convolution_that_is_gone(inputs, reference):
    conv = WSConv2d(3, 4, 3).double()
    reference.loss(conv, inputs[0])
    copy.deepcopy(conv)
    pickle.loads(pickle.dumps(conv))
    kept = weakref.ref(standardized_weight._KEPT[conv])
    del conv
    assert kept() is None
