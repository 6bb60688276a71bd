"""How many groups a GroupNorm gets from the widths of the layer that feeds it.

Source: "On the Ideal Number of Groups for Isometric Gradient Propagation", arXiv 2302.03193.
The paper's symbols: n_in -> in_channels, n_out -> out_channels, G -> num_groups,
F/B (forward over backward activation gain) -> gain_ratio, n_g -> channels_per_group.

Widths are full channel counts. The kernel area and a convolution's own ``groups`` multiply the
fan-in and the fan-out alike and cancel out of their ratio, so grouped (ResNeXt) and depthwise
convolutions use their full widths too.

Everything here is exact: comparisons are made between integers or fractions, never floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real

# No layer is as wide, and finding the divisors takes as many steps as the root of this.
_MAX_WIDTH = 2**31 - 1
RULES = ("practical", "closest", "exact")


def ideal_num_groups(in_channels: int, out_channels: int, gain_ratio: float = 1.0) -> float:
    """The G at which Eq. (31) predicts an unchanged gradient variance; it may be <= 0.

    Eq. (32), Sec. 2.1; with ``gain_ratio`` F/B as in Sec. 2.3 (1 for ReLU).

    Raises:
        TypeError: a width is not an integer, or ``gain_ratio`` is not a number.
        ValueError: a width is below 1, or ``gain_ratio`` is not positive and finite.
    """
    return float(_ideal(in_channels, out_channels, gain_ratio))


def practical_num_groups(
    in_channels: int, out_channels: int, rule: str = "practical", gain_ratio: float = 1.0
) -> int:
    """The divisor of ``out_channels`` that ``rule`` selects.

    Args:
        in_channels: width of the input of the weight layer that feeds the norm.
        out_channels: width of that layer's output, which is the norm's.
        rule: ``"practical"`` is Algorithm 1: the ideal G, clamped to [1, out_channels], then the
            divisor nearest in log2. ``"closest"`` is Definition 3: the divisor whose K(G) is
            closest to 1, the larger one on a tie. The paper's Theorem 1 calls the two equal;
            they differ on some widths, because one compares ratios and the other differences.
            ``"exact"`` is the divisor whose K by the exact law is closest to 1 in log, the larger
            one on a tie. It never leaves fewer than 4 channels to a group, where the expectation
            diverges, except at widths of 1 to 3, which get one group; and one group wherever
            in_channels * gain_ratio <= out_channels, since K then exceeds 1 at every G.
        gain_ratio: F/B of the activation, Sec. 2.3.

    Raises:
        TypeError, ValueError: as :func:`ideal_num_groups`, and for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
    ideal = _ideal(in_channels, out_channels, gain_ratio)
    return _select(ideal, int(out_channels), rule)


def num_groups_of_width(rule: str, out_channels: int) -> int | None:
    """The divisor of ``out_channels`` that a rule of this width alone selects.

    ``"upto_<k>"`` is the largest divisor up to k. ``"cpg_<n>"`` leaves n channels to a group; where
    n does not divide, it is the divisor nearest to ``out_channels`` / n in log2.

    Returns:
        None if ``rule`` is neither of them.
    """
    match = re.fullmatch(r"(upto|cpg)_([1-9]\d*)", rule)
    if match is None:
        return None
    number, candidates = int(match[2]), divisors(out_channels)
    if match[1] == "upto":
        return max(d for d in candidates if d <= number)
    return _nearest(candidates, max(Fraction(out_channels, number), Fraction(1)))


@lru_cache(maxsize=4096)  # a deep model asks for the same few widths over and over
def _select(ideal: Fraction, out_channels: int, rule: str) -> int:
    candidates = divisors(out_channels)
    if rule == "exact":
        width_ratio = out_channels / (4 * ideal + out_channels)  # n_out / (F/B n_in)
        finite = [d for d in candidates if out_channels // d > 3]
        ratios = {d: width_ratio * exact_factor(out_channels // d) for d in finite}
        return min(ratios, key=lambda d: (max(ratios[d], 1 / ratios[d]), -d), default=1)
    if rule == "closest":
        return min(candidates, key=lambda d: (abs(d - ideal), -d))
    assert rule == "practical"
    return _nearest(candidates, min(max(Fraction(1), ideal), Fraction(out_channels)))


def _nearest(candidates: Sequence[int], target: Fraction) -> int:
    """The divisor nearest to ``target`` in log2."""
    # |log2 d - log2 target| orders divisors as max(d/target, target/d) does. Two neighbouring
    # divisors never tie: that needs d1*d2 to be a square, and then its root divides too.
    return min(candidates, key=lambda d: max(d / target, target / d))


def exact_factor(channels_per_group: int) -> Fraction:
    """GroupNorm's factor in the exact law, for more than 3 channels to a group."""
    return Fraction(channels_per_group - 2, channels_per_group - 3)


@lru_cache(maxsize=4096)
def divisors(n: int) -> Sequence[int]:
    """All divisors of ``n`` >= 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


def check_width(name: str, value: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless it is an int of 1 to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if not 1 <= value <= _MAX_WIDTH:
        least = "at least 1" if value < 1 else f"at most {_MAX_WIDTH}"
        raise ValueError(f"{name} must be {least}, got {value}")


def check_num_groups(num_groups: int, out_channels: int) -> None:
    """Raise unless ``num_groups`` divides ``out_channels``; the message lists the divisors."""
    check_width("num_groups", num_groups)
    check_width("out_channels", out_channels)
    if out_channels % num_groups:
        valid = ", ".join(map(str, divisors(out_channels)))
        raise ValueError(
            f"{num_groups} groups do not divide {out_channels} channels; "
            f"the divisors of {out_channels} are {valid}"
        )


def _ideal(in_channels: int, out_channels: int, gain_ratio: float) -> Fraction:
    check_width("in_channels", in_channels)
    check_width("out_channels", out_channels)
    if isinstance(gain_ratio, bool) or not isinstance(gain_ratio, Real):
        raise TypeError(f"gain_ratio must be a number, got {gain_ratio!r}")
    if not (math.isfinite(gain_ratio) and gain_ratio > 0):
        raise ValueError(f"gain_ratio must be positive and finite, got {gain_ratio}")
    return (Fraction(float(gain_ratio)) * int(in_channels) - int(out_channels)) / 4
