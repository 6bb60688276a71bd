"""Figures. The only module that imports matplotlib, and without its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gnpractical.measure.gradient_isometry import BlockGradient, agreement, mean_abs_log


def learning_curves(
    curves: Mapping[str, Sequence[float] | Mapping[int, float]],
    path: str | Path,
    ylabel: str,
    *,
    xlabel: str = "epoch",
    yscale: str = "log",
    highlight: str | None = None,
) -> None:
    """Draw one line for each curve, as in the paper's Figure 2.

    Args:
        curves: For each label one value an epoch, or a mapping from iteration to value. A value
            that is not finite, or 0 on a log axis, leaves a gap.
        path: The picture to write; its ending gives the format.
        highlight: Curves with this word in their label are drawn thick and in front.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = ("-", "--", "-.", ":")
    for i, (label, values) in enumerate(curves.items()):
        bold = highlight is not None and highlight in label
        points = values if isinstance(values, Mapping) else dict(enumerate(values, start=1))
        axes.plot(
            list(points),
            [v if v > 0 or yscale != "log" else math.nan for v in points.values()],
            label=label,
            marker="o" if len(points) < 50 else "",
            markersize=3,
            color="black" if bold else f"C{i % 10}",
            linestyle="-" if bold else styles[i // 10 % len(styles)],
            linewidth=2.5 if bold else 1.2,
            zorder=3 if bold else 2,
        )
    axes.set(yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def block_gradients(
    rows: Mapping[str, Sequence[BlockGradient]],
    predicted: Mapping[str, Mapping[str, float | None]],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Draw measured and predicted K of every unit block, one panel for each row, and G below.

    A bar is the measured K, from the line K = 1, where the gradient keeps its scale; the crosses
    are what the law predicts for it from a forward pass.

    Args:
        rows: For each panel's name the measurements of one model, with the same blocks in all.
        predicted: For each panel's name K of its blocks by the law, by the block's name.
        path: The picture to write; its ending gives the format.

    Raises:
        OSError: ``path`` cannot be written.
    """
    names = [block.name for block in next(iter(rows.values()))]
    width = max(7.0, 2 + 0.2 * len(names))
    figure = Figure(figsize=(width, 1.7 * len(rows) + 3.5), layout="constrained")
    *panels, groups = figure.subplots(len(rows) + 1, sharex=True)
    at = range(len(names))
    for axes, (label, blocks) in zip(panels, rows.items(), strict=True):
        measured = [block.ratio or 1.0 for block in blocks]  # no bar where nothing was measured
        colors = ["C3" if ratio > 1 else "C0" for ratio in measured]
        axes.bar(at, [ratio - 1 for ratio in measured], bottom=1, color=colors, label="measured")
        law = [predicted[label].get(block.name) or math.nan for block in blocks]
        axes.plot(at, law, "x", color="black", markersize=5, label="by the law")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log", ylabel="K")
        axes.set_title(f"G = {label}: mean |log K| {mean_abs_log(blocks):.2f}", loc="left", size=9)
        axes.grid(True, axis="y", alpha=0.25)
    panels[0].legend(fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    for i, (label, blocks) in enumerate(rows.items()):
        counts = [block.num_groups or math.nan for block in blocks]
        groups.plot(at, counts, "o-", markersize=3, linewidth=0.8, color=f"C{i}", label=f"{label}")
    groups.set(ylabel="G", xticks=list(at))
    groups.set_yscale("log", base=2)
    groups.set_xticklabels([name.removesuffix(".norm") for name in names], rotation=90, size=6)
    groups.legend(fontsize="x-small", ncols=len(rows), loc="lower right", bbox_to_anchor=(1, 1))
    groups.grid(True, axis="y", alpha=0.25)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=130)


def isometry_curve(rows: Sequence[Any], path: str | Path) -> None:
    """Draw measured B over channels per group, beside the paper's law and the exact one.

    Args:
        rows: What ``paper.simulation.simulate`` returns.
        path: The picture to write; its ending gives the format.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown = sorted((r for r in rows if r.equation == "B"), key=lambda r: r.channels_per_group)
    n_g = [r.channels_per_group for r in shown]
    axes.plot(n_g, [r.paper for r in shown], "C1--", label="paper: 1 + 4/n_g, Eq. (22)")
    axes.plot(n_g, [r.exact for r in shown], "C0-", label="exact: (n_g - 2)/(n_g - 3)")
    axes.errorbar(
        n_g,
        [r.measured for r in shown],
        [2 * r.standard_error for r in shown],
        fmt="ko",
        markersize=4,
        capsize=3,
        label="measured, 2 standard errors",
    )
    axes.set(xlabel="channels per group, n_g", ylabel="B = Var[y] Var[dL/dy] / Var[dL/dz]")
    axes.set_xscale("log", base=2)
    axes.grid(True, alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)


def predicted_and_measured(
    laws: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, title: str = ""
) -> None:
    """Draw measured K over predicted K, one color for each law, with the line where they agree.

    Args:
        laws: For each law's name pairs of predicted and measured K.
        path: The picture to write; its ending gives the format.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (law, pairs) in zip(("C0", "C1"), laws.items(), strict=True):
        correlation, error = agreement(pairs)
        label = f"{law}: correlation {correlation:.3f}, median error {100 * error:.1f}%"
        x, y = zip(*pairs, strict=True) if pairs else ((), ())
        axes.scatter(x, y, s=14, color=color, alpha=0.6, linewidths=0, label=label)
    axes.axline((1, 1), slope=1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="K by the law", ylabel="K measured", title=title)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=150)
