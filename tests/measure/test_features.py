import copy
import math

import pytest
import torch
from torch import nn

from gnpractical import calibrate, feature_statistics, measure_gradient_variance
from gnpractical.gradient_law import distinctness_gain
from gnpractical.layers import group_norm_from_name
from gnpractical.layers.weight_standardization import standardize_layer


def conv_net(num_groups=4, channels=32, **conv):
    """Two blocks; only the second is looked at, since the first gets white noise."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(32, channels, 3, padding=1),
        nn.GroupNorm(1, channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, **conv),
        nn.GroupNorm(num_groups, 2 * channels),
        nn.ReLU(inplace=True),
    )


def white_loss(model, batch):
    z = model(batch)
    return (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))).sum()


@pytest.mark.parametrize("num_groups", [1, 8, 32, 64])
@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("standardized", [False, True])
def test_the_law_from_a_forward_pass_is_what_a_backward_pass_measures(
    num_groups, conv, standardized
):
    model = conv_net(num_groups, **conv)
    if standardized:
        standardize_layer(model[3])
    x = torch.randn(16, 32, 8, 8) + torch.randn(16, 32, 1, 1)
    block = feature_statistics(model, [x])[1]
    measured = measure_gradient_variance(model, [x], white_loss)[1]
    assert block.layer == "3" and block.activation == "relu"
    assert block.gradient_variance_ratio() == pytest.approx(measured.ratio, rel=0.1)


@pytest.mark.parametrize(
    "conv, size", [(nn.Conv1d(32, 64, 3, 2, 1), (64,)), (nn.Conv3d(32, 64, 3, 2, 1), (8, 8, 8))]
)
def test_other_dimensions_and_norms_without_bias(conv, size):
    torch.manual_seed(0)
    nn.init.kaiming_normal_(conv.weight)
    model = nn.Sequential(conv, nn.GroupNorm(8, 64, bias=False), nn.ReLU())
    x = torch.randn(16, 32, *size).relu()
    (block,) = feature_statistics(model, [x])
    (measured,) = measure_gradient_variance(model, [x], white_loss)
    assert block.gradient_variance_ratio() == pytest.approx(measured.ratio, rel=0.08)


def test_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.GroupNorm(8, 128), nn.ReLU())
    x = torch.randn(512, 256).relu()
    (block,) = feature_statistics(model, [x])
    assert block.mean_share == block.mean_share_behind == pytest.approx(1)
    assert block.positions == 1
    (measured,) = measure_gradient_variance(model, [x], white_loss)
    assert block.gradient_variance_ratio() == pytest.approx(measured.ratio, rel=0.05)
    assert block.gradient_variance_ratio(64) == math.inf


def test_mean_shares_in_front_of_a_norm_and_behind_it():
    model = conv_net(kernel_size=1)
    with torch.no_grad():
        model[4].weight.uniform_(-2, 2)
        model[4].bias.normal_()
    batches = [torch.randn(2, 32, 8, 8), torch.randn(3, 32, 6, 6)]
    block = feature_statistics(model, batches)[1]
    for end, share in ((4, block.mean_share), (5, block.mean_share_behind)):
        features = [model[:end](x) for x in batches]
        of_means = sum((f.mean((2, 3)) ** 2).sum() * f[0, 0].numel() for f in features)
        assert share == pytest.approx(
            (of_means / sum((f**2).sum() for f in features)).item(), rel=1e-4
        )
    assert (block.positions, block.fewest_positions) == (round((2 * 64 + 3 * 36) / 5), 36)


def test_distinctness_grows_by_the_laws_factor():
    model = conv_net(16, channels=64, kernel_size=3, padding=1, padding_mode="circular")
    block = feature_statistics(model, [torch.randn(64, 32, 8, 8) + torch.randn(64, 32, 1, 1)])[1]
    distinct = (1 - block.mean_share) * distinctness_gain(8, block.mean_share)
    assert 1 - block.mean_share_behind == pytest.approx(distinct, rel=0.03)


def test_similarity():
    x = torch.randn(1, 32, 8, 8)
    block = feature_statistics(conv_net(kernel_size=1), [x.expand(4, -1, -1, -1)])[1]
    assert block.similarity == pytest.approx(1, abs=1e-4)
    assert block.effective_rank == pytest.approx(1, abs=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False), nn.GroupNorm(64, 64))
    (block,) = feature_statistics(model, [torch.randn(4, 3, 16, 16)])
    assert abs(block.similarity) < 0.1 and block.effective_rank > 3.9
    (block,) = feature_statistics(model, [torch.randn(1, 3, 8, 8)])  # one image is like no other
    assert block.similarity is None and block.effective_rank is None


def test_the_model_is_as_it_was():
    model = conv_net(kernel_size=1).eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    def failing(model, batch):
        model(batch)
        raise KeyError("late")

    feature_statistics(model, [torch.randn(2, 32, 8, 8)])
    with pytest.raises(KeyError):
        feature_statistics(model, [torch.ones(2, 32, 8, 8)], failing)
    torch.testing.assert_close(model.state_dict(), before)
    assert not model.training and not any(m._forward_hooks for m in model.modules())
    state_now = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(2, 32, 8, 8)
    assert torch.equal(torch.get_rng_state(), state_now)


def test_blocks_of_which_nothing_is_known():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.bare, self.weight = (
                nn.GroupNorm(1, 4),
                nn.GroupNorm(2, 4),
                nn.Parameter(torch.randn(4, 3)),
            )

        def forward(self, x):
            return self.bare(nn.functional.linear(x, self.weight))

    idle, bare = feature_statistics(Model(), [torch.randn(5, 3)])
    assert idle.skipped_reason == "it did not run" and idle.mean_share is None
    assert bare.mean_share == pytest.approx(1)
    assert bare.gradient_variance_ratio() is None  # a function's weight is not looked for
    model = conv_net(kernel_size=1)
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    block = feature_statistics(model, [torch.randn(2, 32, 8, 8)])[1]
    assert block.skipped_reason == "what it gets is zero throughout"


@pytest.mark.parametrize(
    "model, batches, run, error, message",
    [
        (nn.Linear(3, 4), [torch.randn(2, 3)], None, ValueError, "Linear has no GroupNorm to look"),
        (nn.GroupNorm(1, 4), [], None, ValueError, "There are no batches"),
        (nn.GroupNorm(1, 4), torch.randn(2, 4), None, TypeError, "a list of batches, got Tensor"),
        (nn.GroupNorm(1, 4), [torch.randn(2, 4)], 3, TypeError, "run must be a function"),
    ],
)
def test_bad_input(model, batches, run, error, message):
    with pytest.raises(error, match=message):
        feature_statistics(model, batches, run)


def test_a_count_that_does_not_divide():
    block = feature_statistics(conv_net(kernel_size=1), [torch.randn(2, 32, 8, 8)])[1]
    with pytest.raises(ValueError, match="3 groups do not divide 64 channels"):
        block.gradient_variance_ratio(3)


def test_depth_makes_features_alike_as_the_recursion_says():
    """docs/THEORY.md, "The same factor rules the features"."""

    def behind_relu(share):
        return (math.sqrt(1 - share**2) + share * (math.pi - math.acos(share))) / math.pi

    torch.manual_seed(0)
    per_group, layers, share = 8, [], 0.0
    for _ in range(5):
        conv = nn.Conv2d(128, 128, 3, padding=1, bias=False, padding_mode="circular")
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.GroupNorm(128 // per_group, 128), nn.ReLU()]
    blocks = feature_statistics(nn.Sequential(*layers), [torch.randn(32, 128, 16, 16)])
    for block in blocks:
        assert block.mean_share == pytest.approx(share, abs=0.06)
        behind = 1 - (1 - share) * distinctness_gain(per_group, share)
        assert block.similarity == pytest.approx(behind, abs=0.08)
        share = behind_relu(max(behind, 0.0))


def test_norms_without_a_count_and_values_that_are_not_finite():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), group_norm_from_name("GN_MEASURED", 8))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="its number of groups has not been measured"):
        feature_statistics(model, [x])
    with pytest.raises(ValueError, match="^1: what it gets from these batches is not finite"):
        calibrate(model, [x * float("nan")])
    with pytest.raises(ValueError, match="no norm ran: run must call the model"):
        calibrate(model, [x], lambda model, batch: None)
    assert model[1].num_groups is None
    calibrate(model, [x])
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        feature_statistics(model, [x])[0].gradient_variance_ratio(0)
