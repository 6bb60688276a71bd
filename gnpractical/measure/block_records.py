"""What was measured of every unit block and what the laws predict, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.measure.features import BlockFeatures
from gnpractical.measure.gradient_isometry import BlockGradient


def block_records(
    gradients: Iterable[BlockGradient], features: Iterable[BlockFeatures]
) -> list[dict[str, Any]]:
    """One record a block: widths, G, rho, K by the law at several counts, K measured, features.

    Args:
        gradients: The GroupNorms' rows of :func:`measure_gradient_variance`.
        features: The rows of :func:`feature_statistics` of the same model.
    """
    seen = {block.name: block for block in features}
    records = []
    for block in gradients:
        by_law = seen[block.name].gradient_variance_ratio
        behind, paper = seen[block.name].mean_share_behind, None
        if block.in_channels and block.num_groups:
            widths = block.in_channels, block.out_channels
            paper = gradient_variance_ratio(*widths, block.num_groups)
        records.append(
            {
                "layer": block.name,
                "in": block.in_channels,
                "out": block.out_channels,
                "G": block.num_groups,
                "rho": seen[block.name].mean_share,
                "K(1)": by_law(1),
                "K(32)": by_law(32) if block.out_channels % 32 == 0 else None,
                "K(G)": by_law(),
                "K(G) by the paper": paper,
                "K measured": block.ratio,
                "distinct": None if behind is None else 1 - behind,
                "similarity": seen[block.name].similarity,
                "activation": block.activation,
                "skipped": block.skipped_reason,
            }
        )
    return records
