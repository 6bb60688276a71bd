"""How GroupNorm changes the gradient's variance across a unit block, by the paper and exactly.

Source: "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv 2302.03193.
The paper's symbols: n_in -> in_channels, n_out -> out_channels, G -> num_groups,
n_g -> channels_per_group.

The paper adds the variances of three correlated terms in Eq. (22), which is right at n_g = 4 only.
The exact law for a linear layer with Gaussian weights has (n_g - 2)/(n_g - 3) where Eq. (22) has
1 + 4/n_g: normalization projects two of a group's n_g directions out of the gradient, and
E[1/sigma^2] of n_g Gaussian features is n_g/(n_g - 3).
"""

from __future__ import annotations

import math
from fractions import Fraction

from gnpractical.num_groups import check_num_groups, check_width, exact_factor

LAWS = ("paper", "exact")


def gradient_variance_ratio(
    in_channels: int, out_channels: int, num_groups: int, law: str = "paper"
) -> float:
    """K(G): predicted gradient variance at a unit block's input over that at its output.

    1 is isometric. Holds for activations with equal gains, such as ReLU.

    Args:
        law: ``"paper"`` is Eq. (31), Sec. 2.1; ``"exact"`` is that of a linear layer,
            (out/in) (n_g - 2)/(n_g - 3), infinite for 3 or fewer channels per group.

    Raises:
        TypeError, ValueError: A width is not a positive integer, ``num_groups`` does not
            divide ``out_channels``, or the law is unknown.
    """
    check_width("in_channels", in_channels)
    check_num_groups(num_groups, out_channels)
    if law not in LAWS:
        raise ValueError(f"law must be one of {', '.join(map(repr, LAWS))}; got {law!r}")
    if law == "paper":
        return (out_channels + 4 * num_groups) / in_channels
    channels_per_group = out_channels // num_groups
    if channels_per_group <= 3:
        return math.inf
    return float(Fraction(out_channels, in_channels) * exact_factor(channels_per_group))
