"""Whether rows of a comparison differ by more than the noise between their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """Two rows whose means differ: ``higher`` - ``lower`` = ``difference``, with its p-value."""

    higher: str
    lower: str
    difference: float
    p_value: float


def significant_differences(
    samples: Mapping[str, Sequence[float]], level: float = 0.05
) -> list[Difference]:
    """The pairs of rows whose means differ beyond the noise, largest difference first.

    By Tukey's range test, which holds the chance of even one false difference among all pairs to
    ``level``; it assumes the same spread in all rows.

    Args:
        samples: row -> its values, one a seed; rows of fewer than two values, or with one that
            is not finite, are left out.
    """
    from scipy.stats import tukey_hsd  # here, so that importing gnpractical stays light

    samples = {
        row: values
        for row, values in samples.items()
        if len(values) > 1 and all(map(isfinite, values))
    }
    if len(samples) < 2:
        return []
    if all(max(values) == min(values) for values in samples.values()):  # no spread to compare with
        p_values = [[float(fmean(a) == fmean(b)) for b in samples.values()]
                    for a in samples.values()]  # fmt: skip
    else:
        p_values = tukey_hsd(*samples.values()).pvalue
    found = []
    for (i, a), (j, b) in combinations(enumerate(samples), 2):
        difference = fmean(samples[a]) - fmean(samples[b])
        if p_values[i][j] < level:
            higher, lower = (a, b) if difference > 0 else (b, a)
            found.append(Difference(higher, lower, abs(difference), float(p_values[i][j])))
    return sorted(found, key=lambda d: -d.difference)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """``mean +- standard deviation`` (n - 1), or the one value there is; ``nan`` if one is not."""
    if not values:
        return "-"
    if not all(map(isfinite, values)):
        return "nan"
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} +- {stdev(values):.{digits}f}" if len(values) > 1 else mean
