"""K of norms that get something else than one layer's output: sums, concatenations, pooling.

The reference takes the gradient at an input of the norm's own and carries it back by hand, with
torch.nn.grad, so that nothing else arrives at the layer's input.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

from gnpractical import (
    PracticalGroupNorm,
    calibrate,
    convert,
    feature_statistics,
    measure_gradient_variance,
)
from gnpractical.layers import group_norm_from_name


class PreActivation(nn.Module):
    """Two residual blocks, norm first; ``inner`` is applied to each norm's input, for it alone."""

    def __init__(self, last="GN_4"):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = group_norm_from_name(last, 8)
        self.norm2.resolve(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.weights = torch.randn(4, 8, 6, 6)

    def forward(self, x, inner=lambda h: h):
        h = self.stem(x)
        h = h + self.conv1(F.relu(self.norm1(inner(h))))
        h = h + self.conv2(F.relu(self.norm2(inner(h))))
        return (h * self.weights).sum() + h.pow(2).sum() * 0.1


class Dense(nn.Module):
    """Two layers on all features so far; everything concatenated is also used past the norm."""

    def __init__(self, last="GN_4"):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(3, 12), nn.Conv2d(12, 4, 1)
        self.norm3 = group_norm_from_name(last, 16)
        self.norm3.resolve(3 + 8 + 12)
        self.weights = torch.randn(2, 4, 16, 6, 6)

    def forward(self, x, inner=lambda h: h):
        x0 = self.conv0(x)
        x1 = self.conv1(F.relu(self.norm1(inner(x0))))
        x01 = torch.cat([x0, x1], 1)
        x2 = self.conv2(F.relu(self.norm2(inner(x01))))
        all_of_it = torch.cat((x01, x2), dim=-3)  # nested: x0 and x1 are one part
        out = F.relu(self.norm3(inner(all_of_it)))
        return (out * self.weights[0]).sum() + (all_of_it * self.weights[1]).sum()


def naive_input_variances(model, x, fed_by):
    """By norm: the variance at the inputs of its convs, whose outputs are stacked in its input."""
    aliases, inputs = [], {}

    def clone(h):
        aliases.append(h.clone())
        return aliases[-1]

    handles = [
        conv.register_forward_hook(lambda conv, args, out: inputs.update({conv: args[0]}))
        for conv in model.children()
        if isinstance(conv, nn.Conv2d)
    ]
    value = model(x, clone)
    for handle in handles:
        handle.remove()
    variances = {}
    gradients = torch.autograd.grad(value, aliases)
    for (norm, convs), gradient in zip(fed_by.items(), gradients, strict=True):
        convs = [model.get_submodule(conv) for conv in convs]
        pieces = gradient.split([conv.out_channels for conv in convs], 1)
        at_inputs = [
            conv2d_input(inputs[conv].shape, conv.weight, piece, padding=conv.padding).flatten()
            for conv, piece in zip(convs, pieces, strict=True)
        ]
        variances[norm] = torch.cat(at_inputs).var(correction=0).item()
    return variances


FED_BY = {
    PreActivation: {"norm1": ["stem"], "norm2": ["conv1"]},
    Dense: {"norm1": ["conv0"], "norm2": ["conv0", "conv1"], "norm3": ["conv0", "conv1", "conv2"]},
}


@pytest.mark.parametrize("cls", FED_BY)
def test_only_what_flows_through_the_norm_and_its_layers_counts(cls):
    model, x = cls(), torch.randn(4, 3, 6, 6)
    rows = {row.name: row for row in measure_gradient_variance(model, [x])}
    for name, variance in naive_input_variances(model, x, FED_BY[cls]).items():
        assert rows[name].input_variance == pytest.approx(variance, rel=1e-4)
        assert rows[name].layer == ", ".join(FED_BY[cls][name])
        assert rows[name].activation == "relu"
        widths = [model.get_submodule(layer).in_channels for layer in FED_BY[cls][name]]
        assert rows[name].in_channels == sum(widths)


def small_densenet():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 3), num_init_features=8, bn_size=2, num_classes=5
    )


def small_preactivation():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(24)])
            self.convs = nn.ModuleList([nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1)])

        def forward(self, x):
            h = self.convs[0](F.relu(self.norms[0](x)))
            return x + self.convs[1](F.relu(self.norms[1](h)))

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Block(),
        Block(),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def ours(model):
    return [m for m in model.modules() if isinstance(m, PracticalGroupNorm)]


@pytest.mark.parametrize("build", [small_densenet, small_preactivation])
def test_every_norm_of_a_converted_model_is_calibrated(build):
    model, x = build(), torch.randn(4, 3, 64, 64)
    convert(model, x, rule="measured")
    rows = calibrate(model, [x])
    assert len(rows) == len(ours(model))
    assert all(row.ratios and row.num_groups for row in rows)


def test_the_law_holds_behind_residual_additions():
    torch.manual_seed(0)
    model, x = small_preactivation(), torch.randn(8, 3, 32, 32)
    convert(model, x, rule="cpg_4")

    def loss(model, batch):
        return F.cross_entropy(model(batch), torch.arange(8) % 5)

    law = {row.name: row.gradient_variance_ratio() for row in feature_statistics(model, [x])}
    measured = {row.name: row.ratio for row in measure_gradient_variance(model, [x], loss)}
    # The last norm is in front of global pooling, where the gradient is the same everywhere.
    for name in [name for name in measured if name != "3"]:
        assert law[name] == pytest.approx(measured[name], rel=0.2)


class Between(nn.Module):
    """A conv, something, a norm, ReLU."""

    def __init__(self, something, norm):
        super().__init__()
        self.conv, self.norm, self.something = nn.Conv2d(3, 8, 1), norm, something

    def forward(self, x):
        return F.relu(self.norm(self.something(self.conv(x)))).pow(3).sum()


@pytest.mark.parametrize(
    "something",
    [
        nn.Flatten(2),
        nn.AvgPool2d(2),
        F.relu,
        lambda y: y[:, :, ::2] * 1.5,
        lambda y: y.sigmoid_(),
        lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    ],
)
def test_what_lies_between_the_layer_and_the_norm_is_passed(something):
    x = torch.randn(4, 3, 6, 6)
    model = Between(something, nn.GroupNorm(2, 8))
    (row,) = measure_gradient_variance(model, [x])
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x), x)
    assert row.layer == "conv" and row.activation == "relu"
    assert row.input_variance == pytest.approx(gradient.var(correction=0).item(), rel=1e-4)


def added_to_a_detached(model, y):
    return y.detach() + model.shift


def concatenated_with_a_detached(model, y):
    return torch.cat([y[:, :4], y[:, 4:].detach()], 1)


def changed_in_place(model, y):
    part = y[:, 4:] * 1.0
    both = torch.cat([y[:, :4], part], 1)
    part.relu_()
    return both


@pytest.mark.parametrize(
    "something", [added_to_a_detached, concatenated_with_a_detached, changed_in_place]
)
def test_a_norm_whose_layers_no_gradient_reaches_is_not_measured(something):
    model = Between(lambda y: something(model, y), nn.GroupNorm(2, 8))
    model.shift = nn.Parameter(torch.randn(8, 1, 1))
    (row,) = measure_gradient_variance(model, [torch.randn(4, 3, 6, 6)])
    assert row.ratio is None and row.skipped_calls == 1 and row.skipped_reason


def test_norms_fed_directly_cost_one_backward_pass(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()) for _ in range(3)]
    x = torch.randn(2, 4, 3, 3)
    measure_gradient_variance(nn.Sequential(*blocks), [x, x], lambda m, b: m(b).pow(2).sum())
    assert len(calls) == 2  # batches


def test_nothing_is_left_behind():
    class Keeping(Dense):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, 8, 6, 6))

        def forward(self, x):
            self.mean.mul_(0.9).add_(self.conv0(x).detach())
            return super().forward(x)

    model = Keeping()
    attributes = [set(vars(t)) for t in model.state_dict(keep_vars=True).values()]
    measure_gradient_variance(model, [torch.randn(4, 3, 6, 6)])
    assert not model.mean.any()
    assert attributes == [set(vars(t)) for t in model.state_dict(keep_vars=True).values()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
