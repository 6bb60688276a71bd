"""Which number of groups each GroupNorm of a model has, and what the paper predicts for it.

Symbols as in ``gradient_law``: K(G) is the predicted variance of the gradient at a block's input
over that at its output, Eq. (31) of arXiv 2302.03193.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.layers.group_norm import PracticalGroupNorm
from gnpractical.layers.pairing import find_pairs, layer_widths
from gnpractical.layers.weight_standardization import is_weight_standardized
from gnpractical.num_groups import ideal_num_groups


@dataclass(frozen=True)
class LayerGroups:
    """One GroupNorm of a model.

    Attributes:
        name: path of the norm in the model.
        norm: the config string that selects it: ``GN_PRACTICAL``, ``GN_32``, ...
        in_channels: input width of the weight layer that feeds it; None if none was found, and
            then the four predictions are None too.
        out_channels: its own width.
        num_groups: G; None for a norm that has none yet (GN_MEASURED before calibration).
        ideal: Eq. (32), before clamping and rounding.
        ratio, ratio_1, ratio_32: K(G), K(1), K(32); the last is None where 32 does not divide.
        frozen: its parameters do not train.
        weight_standardized: the layer that feeds it is weight standardized.
        matched_from: the norm whose weights it began with, such as ``BatchNorm2d``, if it was
            matched to it (see ``runs.carry_over``), else "".
    """

    name: str
    norm: str
    in_channels: int | None
    out_channels: int
    num_groups: int | None
    ideal: float | None
    ratio: float | None
    ratio_1: float | None
    ratio_32: float | None
    frozen: bool
    weight_standardized: bool
    matched_from: str = ""

    @property
    def flags(self) -> str:
        """What is worth noticing: ``G=1``, ``G=C``, ``frozen``, ``WS``, ``matched``; without a
        count ``unresolved`` (no weight layer is known) or ``uncalibrated`` (GN_MEASURED)."""
        marks = {
            "unresolved": self.num_groups is None and self.in_channels is None,
            "uncalibrated": self.num_groups is None and self.in_channels is not None,
            "G=1": self.num_groups == 1,
            "G=C": self.num_groups == self.out_channels,
            "frozen": self.frozen,
            "WS": self.weight_standardized,
            "matched": bool(self.matched_from),
        }
        return " ".join(mark for mark, holds in marks.items() if holds)


def group_report(model: nn.Module) -> list[LayerGroups]:
    """One row for every GroupNorm of ``model``, in registration order; [] if it has none."""
    rows = []
    for pair in find_pairs(model):
        norm = pair.norm
        if not isinstance(norm, nn.GroupNorm):
            continue
        widths = [layer_widths(layer) or (0, 0) for layer in pair.layers.values()]
        in_channels = sum(width[0] for width in widths) or None
        name = f"GN_{norm.num_groups}"
        if isinstance(norm, PracticalGroupNorm):
            in_channels = norm.in_channels or in_channels
            name = norm.norm_name
        rows.append(
            LayerGroups(
                name=pair.norm_name,
                norm=name,
                in_channels=in_channels,
                out_channels=norm.num_channels,
                num_groups=norm.num_groups,
                ideal=ideal_num_groups(in_channels, norm.num_channels) if in_channels else None,
                ratio=_ratio(in_channels, norm.num_channels, norm.num_groups),
                ratio_1=_ratio(in_channels, norm.num_channels, 1),
                ratio_32=_ratio(in_channels, norm.num_channels, 32),
                frozen=norm.weight is not None and not norm.weight.requires_grad,
                weight_standardized=is_weight_standardized(pair),
                matched_from=getattr(norm, "matched_from", ""),
            )
        )
    return rows


def format_report(rows: Iterable[LayerGroups]) -> str:
    """The rows as a table, with totals.

    ::

        layer          in   out   G_ideal   G   K(G)   K(1)   K(32)   norm          flags
        conv1.norm    256   128        32  32   1.00   0.52    1.00   GN_PRACTICAL
        1 GroupNorm layers: G=1 in 0, G=C in 0, frozen 0; G: 32 x1
    """
    rows = list(rows)
    if not rows:
        return "The model has no GroupNorm layers."
    table = tabulate(
        [
            [
                r.name,
                r.in_channels,
                r.out_channels,
                r.ideal,
                r.num_groups,
                r.ratio,
                r.ratio_1,
                r.ratio_32,
                r.norm,
                r.flags,
            ]
            for r in rows
        ],
        ["layer", "in", "out", "G_ideal", "G", "K(G)", "K(1)", "K(32)", "norm", "flags"],
        floatfmt=("", "", "", ".6g", "", ".2f", ".2f", ".2f", "", ""),
        missingval="-",
        disable_numparse=[0],  # a layer may be called "0.1"
    )
    counts = Counter(r.num_groups for r in rows if r.num_groups is not None)
    totals = (
        f"{len(rows)} GroupNorm layers: G=1 in {counts[1]}, "
        f"G=C in {sum(r.num_groups == r.out_channels for r in rows)}, "
        f"frozen {sum(r.frozen for r in rows)}; "
        f"G: {', '.join(f'{g} x{n}' for g, n in sorted(counts.items()))}"
    )
    return f"{table}\n{totals}"


def _ratio(in_channels: int | None, out_channels: int, num_groups: int | None) -> float | None:
    if not in_channels or not num_groups or out_channels % num_groups:
        return None
    return gradient_variance_ratio(in_channels, out_channels, num_groups)
