import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2

from gnpractical.gradient_law import distinctness_gain, gradient_variance_ratio, norm_factor


def test_ratio_is_eq_31():
    assert gradient_variance_ratio(128, 128, 1) == 1.03125
    assert gradient_variance_ratio(128, 128, 32) == 2.0
    assert gradient_variance_ratio(784, 512, 64) == pytest.approx(768 / 784)


def test_ratio_of_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="48 groups do not divide 256 channels.*1, 2, 4"):
        gradient_variance_ratio(64, 256, 48)


def test_exact_law():
    assert gradient_variance_ratio(512, 256, 64, law="exact") == pytest.approx(1)
    assert gradient_variance_ratio(512, 256, 32, law="exact") == pytest.approx(0.6)
    assert gradient_variance_ratio(6, 6, 1, law="exact") == pytest.approx(4 / 3)
    assert gradient_variance_ratio(6, 6, 2, law="exact") == math.inf
    with pytest.raises(ValueError, match="law must be one of 'paper', 'exact'; got 'true'"):
        gradient_variance_ratio(6, 6, 2, law="true")


@pytest.mark.parametrize("channels_per_group", [2, 3, 8, 64, 4096])
@pytest.mark.parametrize("mean_share", [1e-9, 0.1, 0.5, 0.99])
def test_expectation_over_chi_squared(channels_per_group, mean_share):
    squares = chi2(channels_per_group - 1)

    def inverse_variance(quantile):
        return 1 / (1 - mean_share + mean_share * squares.ppf(quantile) / channels_per_group)

    expected, _ = quad(inverse_variance, 0, 1, limit=500, epsabs=1e-11, epsrel=1e-11)
    gain = distinctness_gain(channels_per_group, mean_share)
    assert gain == pytest.approx(expected, rel=1e-8)


def test_limits_of_the_distinctness_gain():
    assert distinctness_gain(64, 0) == pytest.approx(1, rel=1e-8)
    assert distinctness_gain(1, 0.3) == pytest.approx(1 / 0.7, rel=1e-8)
    for channels_per_group in (4, 5, 100, 100_000):
        of_means_alone = channels_per_group / (channels_per_group - 3)
        assert distinctness_gain(channels_per_group, 1) == pytest.approx(of_means_alone, rel=1e-8)
    assert distinctness_gain(3, 1) == norm_factor(2) == math.inf
    assert distinctness_gain(2, 0.3, 10**9) == pytest.approx(distinctness_gain(2, 0.3), rel=1e-8)
    assert distinctness_gain(1, 0.3, positions=3) == math.inf  # of two degrees of freedom


@pytest.mark.parametrize("channels_per_group, positions", [(1, 4), (1, 64), (4, 2), (16, 9)])
def test_white_noise_is_a_linear_layer_of_all_its_values(channels_per_group, positions):
    values = channels_per_group * positions
    factor = norm_factor(channels_per_group, 1 / positions, positions)
    assert factor == pytest.approx((values - 2) / (values - 3), rel=1e-8)


def test_features_become_distinct_by_the_gain():
    torch.manual_seed(0)
    means = 0.7**0.5 * torch.randn(100_000, 4, 1)
    around = torch.randn(100_000, 4, 16)
    around = 0.3**0.5 * (around - around.mean(-1, keepdim=True)) / around.std(-1, keepdim=True)
    around = around * (16 / 15) ** 0.5
    z = torch.group_norm(means + around, 1)
    distinct = z.var(-1, correction=0).mean().item()
    assert distinct == pytest.approx(0.3 * distinctness_gain(4, 0.7), rel=0.01)


def test_law_of_a_convolution():
    k = gradient_variance_ratio(
        128, 256, 64, law="exact", mean_share=0.5, positions=49, gain_ratio=0.4, stride=2
    )
    assert k == pytest.approx(2 * norm_factor(4, 0.5, 49) / 0.4 / 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mean_share": 1.5}, "mean_share is a share of energy, between 0 and 1; got 1.5"),
        ({"mean_share": -0.1}, "between 0 and 1"),
        ({"mean_share": math.nan}, "between 0 and 1"),
        ({"mean_share": "all"}, "between 0 and 1; got 'all'"),
        ({"positions": 0}, "positions must be at least 1, got 0"),
        ({"mean_share": 0.5}, "mean_share must be 1 where there is one position, got 0.5"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"gain_ratio": 0}, "gain_ratio must be positive and finite, got 0"),
        ({"gain_ratio": math.inf}, "gain_ratio must be positive and finite, got inf"),
        ({"law": "paper", "mean_share": 0.5, "positions": 9}, "take law='exact'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradient_variance_ratio(64, 64, 4, **({"law": "exact"} | arguments))
