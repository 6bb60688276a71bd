"""Whether rows of a comparison differ by more than the noise between their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isfinite
from statistics import fmean, stdev
from typing import Any

from tabulate import tabulate

from gnpractical.paper.training_run import JUDGED, SCORES


def significant_differences(samples: Mapping[str, Sequence[float]], level: float = 0.05) -> str:
    """Say which rows' means differ beyond the noise, with the largest difference first.

    Tukey's range test holds the chance of even one false difference among all pairs to ``level``.
    It assumes the same spread in all rows.

    ::

        practical over 32 by 10.50 (p 0.001); practical over 1 by 10.17 (p 0.001)

    Args:
        samples: The values of each row, one for each seed. Rows of fewer than two values, or with
            one that is not finite, are left out.
    """
    from scipy.stats import tukey_hsd  # here, so that importing this module stays light

    usable = [row for row, v in samples.items() if len(v) > 1 and all(map(isfinite, v))]
    rows = sorted(usable, key=lambda row: fmean(samples[row]))
    if len(rows) < 2 or all(len(set(samples[row])) == 1 for row in rows):
        return "none"  # without any spread there is no noise to compare with
    p_values = tukey_hsd(*(samples[row] for row in rows)).pvalue
    found = []
    for (i, low), (j, high) in combinations(enumerate(rows), 2):
        difference, p_value = fmean(samples[high]) - fmean(samples[low]), p_values[i][j]
        if p_value < level:
            found.append((difference, f"{high} over {low} by {difference:.2f} (p {p_value:.3f})"))
    return "; ".join(text for _, text in sorted(found, reverse=True)) or "none"


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Format as ``mean +- standard deviation`` (n - 1), one value alone, and none as ``-``."""
    if not values:
        return "-"
    if not all(map(isfinite, values)):
        return "nan"  # statistics.stdev fails on one
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} +- {stdev(values):.{digits}f}" if len(values) > 1 else mean


def format_runs(runs: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Format a table of the rows' results, and which differ beyond the noise."""
    scores = {row: [r["scores"] for r in results] for row, results in runs.items()}
    values = {
        name: {row: [s[name] for s in held if name in s] for row, held in scores.items()}
        for name in SCORES
    }
    present = [name for name in SCORES if any(values[name].values())]
    table = [
        [row, len(results)]
        + [mean_and_spread(values[name][row]) for name in present]
        + [
            mean_and_spread([r["seconds_per_step"] for r in results], 3),
            f"{fmean(r['peak_memory_mib'] for r in results):.0f}",
        ]
        for row, results in runs.items()
    ]
    names = [s.split("/")[1] if s.startswith("pan") else s.replace("/", " ") for s in present]
    text = tabulate(table, ["G", "runs", *names, "s/step", "peak MiB"], disable_numparse=True)
    for name in (name for name in JUDGED if name in present):
        found = significant_differences(values[name])
        text += f"\n{name}: differences beyond the noise (Tukey's range test, 5%): {found}"
    return text
