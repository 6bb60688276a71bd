"""How GroupNorm changes the gradient's variance across a unit block, by the paper and exactly.

Source: "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv 2302.03193.
The paper's symbols: n_in -> in_channels, n_out -> out_channels, G -> num_groups,
n_g -> channels_per_group, F/B -> gain_ratio.

The paper adds the variances of three correlated terms in Eq. (22), which is right at n_g = 4 only.
The exact law is derived in docs/THEORY.md for random weights and gradients that point nowhere. It
needs one number more than the widths: the share of a feature map's energy that lies in the means of
its channels (the mean over positions), in each sample. That is all of it in a linear layer.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np

from gnpractical.num_groups import check_num_groups, check_width

LAWS = ("paper", "exact")

# Of the quadrature in ``distinctness_gain``: s = exp(u). The integrand is analytic in u and dies
# out at both ends at least as exp(-|u|/2), so that equal steps of 1/4 are exact to about 1e-12.
_STEP = 0.25
_S = np.exp(np.arange(-60, 90, _STEP))


def gradient_variance_ratio(
    in_channels: int,
    out_channels: int,
    num_groups: int,
    law: str = "paper",
    mean_share: float = 1.0,
    positions: int = 1,
    gain_ratio: float = 1.0,
    stride: int = 1,
) -> float:
    """K(G): predicted gradient variance at a unit block's input over that at its output.

    1 is isometric. The defaults are those of a linear layer between activations of equal gains,
    such as ReLU; they alone can be chosen in the paper's law.

    Args:
        law: ``"paper"`` is Eq. (31), Sec. 2.1; ``"exact"`` is
            (out/in) :func:`norm_factor` / (``gain_ratio`` ``stride``^2).
        mean_share: What share of the energy of the layer's input lies in the channels' means.
        positions: How many positions (H W) the norm's input has.
        gain_ratio: The mean square of the layer's input over the backward gain of the activation
            behind the norm. It is F/B between two activations.
        stride: The layer's, in each of two dimensions.

    Raises:
        TypeError, ValueError: A width is not a positive integer, ``num_groups`` does not
            divide ``out_channels``, the law is unknown or does not have an argument that was
            given, or an argument is out of range.
    """
    check_width("in_channels", in_channels)
    check_num_groups(num_groups, out_channels)
    check_width("stride", stride)
    check_width("positions", positions)
    if law not in LAWS:
        raise ValueError(f"law must be one of {', '.join(map(repr, LAWS))}; got {law!r}")
    if not (_is_real(gain_ratio) and 0 < gain_ratio < math.inf):
        raise ValueError(f"gain_ratio must be positive and finite, got {gain_ratio!r}")
    factor = norm_factor(out_channels // num_groups, mean_share, positions)
    if law == "exact":
        return out_channels / in_channels * factor / (gain_ratio * stride**2)
    if (mean_share, positions, gain_ratio, stride) != (1, 1, 1, 1):
        raise ValueError(
            "the paper's law knows widths and groups alone: with mean_share, positions, "
            "gain_ratio or stride take law='exact'"
        )
    return (out_channels + 4 * num_groups) / in_channels


def norm_factor(channels_per_group: int, mean_share: float = 1.0, positions: int = 1) -> float:
    """GroupNorm's factor in the exact law: A (1 - 2 / (n_g positions)).

    A is the :func:`distinctness_gain`; the rest is what the norm projects out of the gradient: two
    directions of a group's. It is (n_g - 2)/(n_g - 3) for a linear layer, and infinite there for
    3 or fewer channels to a group.

    Raises:
        TypeError, ValueError: As :func:`distinctness_gain`.
    """
    gain = distinctness_gain(channels_per_group, mean_share, positions)
    if math.isinf(gain):
        return gain
    return gain * max(0.0, 1 - 2 / (channels_per_group * positions))


def distinctness_gain(
    channels_per_group: int, mean_share: float, positions: float = math.inf
) -> float:
    """A = E[1 / ((1 - rho) Y + rho X/n_g)]: by this factor a norm grows gradients' variance.

    The denominator is the variance that a group is divided by. X is chi-squared with n_g - 1
    degrees of freedom; Y, of what lies around the channels' means, with n_g (positions - 1), over
    as many, so that it is 1 for many positions. By the same factor normalization then grows
    1 - rho, the share of the features' energy that is distinct between positions: behind the norm
    it is (1 - rho) A.

    Args:
        channels_per_group: n_g.
        mean_share: rho, the share of the energy that lies in the channels' means.
        positions: Over which each channel's mean is taken.

    Returns:
        For many positions from 1 at ``mean_share`` 0 to n_g/(n_g - 3) at 1; infinity where the
        expectation is.

    Raises:
        TypeError, ValueError: ``channels_per_group`` or ``positions`` is no integer of at least 1,
            or ``mean_share`` is not between 0 and 1.
    """
    check_width("channels_per_group", channels_per_group)
    if positions != math.inf:
        check_width("positions", positions)  # type: ignore[arg-type]
    if not (_is_real(mean_share) and 0 <= mean_share <= 1):
        raise ValueError(f"mean_share is a share of energy, between 0 and 1; got {mean_share!r}")
    if positions == 1 and mean_share != 1:
        raise ValueError(
            f"mean_share must be 1 where there is one position, got {mean_share}: give positions"
        )
    of_means = channels_per_group - 1 if mean_share else 0
    around = channels_per_group * (positions - 1) if mean_share < 1 else 0
    if of_means + around <= 2:  # degrees of freedom
        return math.inf
    # 1/x is the integral of exp(-s x), of which the expectation is known.
    log_moment = -of_means / 2 * np.log1p(2 * _S * mean_share / channels_per_group)
    if around == math.inf:
        log_moment -= _S * (1 - mean_share)
    elif around:
        log_moment -= around / 2 * np.log1p(2 * _S * (1 - mean_share) / around)
    return float(_STEP * np.sum(_S * np.exp(log_moment)))


def _is_real(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
