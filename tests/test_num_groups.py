import math
import random
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest

from gnpractical.num_groups import (
    divisors,
    ideal_num_groups,
    num_groups_of_width,
    practical_num_groups,
)


def brute_force_divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def algorithm_1(in_channels, out_channels, gain_ratio=Fraction(1)):
    """Distances in log2 compared by cross-multiplied squares, not by ratios as in the code."""
    ideal = (gain_ratio * in_channels - out_channels) / 4
    g = min(max(ideal, 1), out_channels)
    best = None
    for d in brute_force_divisors(out_channels):
        if best is None:
            best = d
        else:  # d > best: nearer in log2 iff g lies beyond their geometric mean
            best = d if g * g > best * d else best
    return best


def definition_3(in_channels, out_channels, gain_ratio=Fraction(1)):
    k = {
        d: abs((out_channels + 4 * d) / (gain_ratio * in_channels) - 1)
        for d in brute_force_divisors(out_channels)
    }
    return max(d for d in k if k[d] == min(k.values()))


def exact_law(in_channels, out_channels, gain_ratio=Fraction(1)):
    """Log distances in 60 digits; the larger of two equal ones."""
    getcontext().prec = 60
    best = None
    for d in brute_force_divisors(out_channels):
        n_g = out_channels // d
        if n_g > 3:
            k = Fraction(out_channels, in_channels) / gain_ratio * Fraction(n_g - 2, n_g - 3)
            log = abs((Decimal(k.numerator) / Decimal(k.denominator)).ln())
            if best is None or log <= best[0] + Decimal("1e-50"):
                best = log, d
    return best[1] if best else 1


@pytest.mark.parametrize(
    "in_channels, out_channels, expected",
    [(784, 512, 64), (256, 128, 32), (128, 128, 1), (1024, 256, 256), (256, 64, 64), (128, 64, 16)],
)
def test_the_papers_examples(in_channels, out_channels, expected):
    assert practical_num_groups(in_channels, out_channels) == expected


def test_ideal_is_eq_32_and_may_be_negative():
    assert ideal_num_groups(784, 512) == 68
    assert ideal_num_groups(128, 128) == 0
    assert ideal_num_groups(64, 256) == -48
    assert ideal_num_groups(100, 50, gain_ratio=1.5) == 25


def test_practical_and_closest_differ_where_the_paper_says_they_agree():
    # G_ideal 4.9 between the divisors 4 and 6 of 12: nearer to 4 on a line, to 6 in log2.
    gain_ratio = 31.6 / 30
    assert ideal_num_groups(30, 12, gain_ratio) == pytest.approx(4.9)
    assert practical_num_groups(30, 12, "practical", gain_ratio) == 6
    assert practical_num_groups(30, 12, "closest", gain_ratio) == 4


def test_closest_takes_the_larger_on_a_tie():
    # in 32, out 12: G_ideal 5 is as far from 4 as from 6.
    assert practical_num_groups(32, 12, "closest") == 6


def test_divisors_of_primes_and_squares():
    for n in [1, 2, 7, 36, 64, 97, 4093, 4096]:
        assert list(divisors(n)) == brute_force_divisors(n)


def test_random_widths_against_brute_force():
    rng = random.Random(0)
    for _ in range(1500):
        in_channels, out_channels = rng.randint(1, 4096), rng.randint(1, 4096)
        assert practical_num_groups(in_channels, out_channels) == algorithm_1(
            in_channels, out_channels
        )
        assert practical_num_groups(in_channels, out_channels, "closest") == definition_3(
            in_channels, out_channels
        )


def test_random_gain_ratios_against_brute_force():
    rng = random.Random(1)
    for _ in range(500):
        widths, gain = (rng.randint(1, 512), rng.randint(1, 512)), rng.uniform(0.1, 4)
        args = (*widths, Fraction(gain))
        assert practical_num_groups(*widths, "practical", gain) == algorithm_1(*args)
        assert practical_num_groups(*widths, "closest", gain) == definition_3(*args)


@pytest.mark.slow
def test_every_out_width_up_to_4096_switches_divisor_exactly_at_the_geometric_mean():
    # G rises with in_channels, so the two widths beside each switch prove all widths between.
    for out in range(1, 4097):
        ds = divisors(out)
        for d1, d2 in zip(ds, ds[1:], strict=False):
            # (in - out)**2 > 16 d1 d2 selects d2
            last = out + math.isqrt(16 * d1 * d2)
            assert practical_num_groups(last, out) == d1
            assert practical_num_groups(last + 1, out) == d2


def test_no_ties_can_occur():
    # A tie needs G * G == d1 * d2 for neighbouring divisors, so that d1 * d2 is a square.
    for out in range(1, 4097):
        ds = divisors(out)
        for d1, d2 in zip(ds, ds[1:], strict=False):
            assert math.isqrt(d1 * d2) ** 2 != d1 * d2


def test_bounds():
    for out in [1, 7, 64, 256]:
        assert practical_num_groups(out, out) == 1
        assert practical_num_groups(1, out) == 1
        assert practical_num_groups(5 * out, out) == out
        assert practical_num_groups(100 * out, out) == out


@pytest.mark.parametrize("bad", [0, -3])
def test_widths_below_one(bad):
    with pytest.raises(ValueError, match="in_channels must be at least 1"):
        practical_num_groups(bad, 64)
    with pytest.raises(ValueError, match="out_channels must be at least 1"):
        ideal_num_groups(64, bad)


def test_widths_that_no_layer_has():
    with pytest.raises(ValueError, match="out_channels must be at most 2147483647, got 10000"):
        practical_num_groups(64, 10**18)


@pytest.mark.parametrize("bad", [64.0, True, "64", None])
def test_widths_of_other_types(bad):
    with pytest.raises(TypeError, match="in_channels must be an integer"):
        practical_num_groups(bad, 64)
    with pytest.raises(TypeError, match="out_channels must be an integer"):
        practical_num_groups(64, bad)


def test_unknown_rule_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'practical', 'closest', 'exact'; got 'best'"):
        practical_num_groups(64, 64, "best")


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf")])
def test_gain_ratio_must_be_positive(bad):
    with pytest.raises(ValueError, match="gain_ratio"):
        practical_num_groups(64, 64, "practical", bad)


@pytest.mark.parametrize(
    "in_channels, out_channels, expected",
    [
        (256, 128, 32),  # r = 2: 4 channels a group, as in the paper
        (1536, 1024, 128),  # r = 1.5: 4 channels a group give K = 4/3, 8 give 4/5, which is nearer
        (1024, 256, 64),  # r = 4: never fewer than 4 channels a group
        (128, 128, 1),
        (64, 256, 1),
        (8, 3, 1),  # no divisor leaves 4 channels
        (8, 7, 1),  # a prime: 7 or 1 channels
    ],
)
def test_exact_rule(in_channels, out_channels, expected):
    assert practical_num_groups(in_channels, out_channels, rule="exact") == expected


def test_exact_rule_against_brute_force():
    rng = random.Random(5)
    pairs = [(rng.randint(1, 4096), rng.randint(1, 4096)) for _ in range(150)]
    pairs += [(out * r, out) for out in (4, 12, 97, 360, 1024) for r in (1, 2, 3, 5)]
    for in_channels, out_channels in pairs:
        for gain in (1.0, 0.75):
            assert practical_num_groups(
                in_channels, out_channels, rule="exact", gain_ratio=gain
            ) == exact_law(in_channels, out_channels, Fraction(gain)), (in_channels, out_channels)


def test_numpy_widths_give_plain_numbers():
    np = pytest.importorskip("numpy")
    assert type(practical_num_groups(np.int64(300), np.int64(100))) is int
    assert type(practical_num_groups(300, 100)) is int


@pytest.mark.parametrize(
    "rule, out_channels, expected",
    [
        ("upto_32", 256, 32),
        ("upto_32", 48, 24),
        ("upto_32", 16, 16),
        ("upto_32", 97, 1),
        ("cpg_16", 256, 16),
        ("cpg_16", 8, 1),
        ("cpg_16", 24, 2),  # 1.5 is nearer to 2 than to 1 in log2
        ("cpg_1", 64, 64),
        ("cpg_3", 64, 16),  # 21.3
        ("practical", 64, None),
        ("upto_0", 64, None),
        ("cpg_16.5", 64, None),
    ],
)
def test_rules_of_the_width_alone(rule, out_channels, expected):
    assert num_groups_of_width(rule, out_channels) == expected


def test_channels_per_group_is_exact_wherever_it_divides():
    for out_channels in range(1, 200):
        for n in brute_force_divisors(out_channels):
            assert num_groups_of_width(f"cpg_{n}", out_channels) == out_channels // n
