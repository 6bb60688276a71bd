"""Any model's BatchNorms and GroupNorms as GroupNorms with per-layer group counts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from gnpractical.layers.data_flow import FUNCTION, Source
from gnpractical.layers.group_norm import MIN_VALUES, PracticalGroupNorm
from gnpractical.layers.norm_calls import feeding_sources, trace_norms
from gnpractical.layers.pairing import layer_widths, norm_width
from gnpractical.layers.weight_standardization import standardize_layer
from gnpractical.num_groups import check_num_groups, check_width, divisors

_INSTANCE_NORMS = (
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d),
)


NOT_CHOSEN = "not chosen by include and exclude"


@dataclass(frozen=True)
class ConvertedNorm:
    """What became of one norm.

    Attributes:
        name: Its path.
        was: Its class before.
        num_channels: C.
        in_channels: Input width of the layers that feed it, None where they are not known.
        layers: Paths of these layers; ``FUNCTION`` stands for a function without a module.
        num_groups: G; None for a norm that was left alone, or is yet to be calibrated.
        skipped_reason: Why it was left alone, "" for a converted norm.
        limited_from: What the rule gives, where that left fewer than ``MIN_VALUES`` values to a
            group on the example inputs and a smaller G was taken.
    """

    name: str
    was: str
    num_channels: int
    in_channels: int | None
    layers: tuple[str, ...]
    num_groups: int | None
    skipped_reason: str
    limited_from: int | None = None

    @property
    def note(self) -> str:
        limited = f"limited from G={self.limited_from}" if self.limited_from else ""
        return self.skipped_reason or limited


# A norm, what becomes of it, and its replacement, if it gets one.
_Plan = tuple[nn.Module, ConvertedNorm, PracticalGroupNorm | None]


@dataclass(frozen=True)
class Conversion:
    """A converted model and a row for each of its norms, in registration order."""

    model: nn.Module
    norms: list[ConvertedNorm]

    def __str__(self) -> str:
        table = [
            [
                *(n.name, n.was, n.in_channels, n.num_channels, n.num_groups),
                *(", ".join(n.layers), n.note),
            ]
            for n in self.norms
        ]
        converted = sum(not norm.skipped_reason for norm in self.norms)
        headers = ["norm", "was", "in", "out", "G", "fed by", "note"]
        text = tabulate(table, headers, missingval="-", disable_numparse=[0, 5])
        return f"{text}\n{converted} of {len(self.norms)} norms converted"


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    rule: str | int = "cpg_4",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    on_unpaired: str | int = "error",
    weight_standardization: bool = False,
    inplace: bool = True,
) -> Conversion:
    """Replace every BatchNorm and GroupNorm of ``model`` by a :class:`PracticalGroupNorm`.

    These are BatchNorm1d, 2d and 3d, SyncBatchNorm, the frozen ones of torchvision and Detectron2,
    and GroupNorm; InstanceNorm and LayerNorm stay. Weight and bias keep their values and
    ``requires_grad`` (those of a frozen norm become parameters that do not train). Running
    statistics are dropped, so that the outputs change and the model needs training.

    Args:
        model: Any model that is not scripted.
        example_inputs: What the model runs on once, in evaluation mode: a tensor, a tuple of
            positional arguments or a dict of keyword arguments. With it the layers that feed each
            norm are found by data flow (see ``data_flow``), without it by structure (see
            ``pairing``). Norms that do not run, as those used in training only, go by structure.
        rule: As :class:`PracticalGroupNorm`'s; by default four channels to a group, which did as
            well as 32 groups or better wherever both were trained (docs/RESULTS.md). A width rule's
            number is lowered where the example inputs show fewer than ``MIN_VALUES`` values to a
            group.
        include, exclude: Patterns of norm paths, such as ``"backbone.*"``; the others are left.
        on_unpaired: What to do with a norm whose feeding layer is not known or not unique:
            "error", "keep" (leave it), or a number of groups to give it.
        weight_standardization: Standardize the convolutions that feed converted norms.
        inplace: Change ``model`` itself, else a copy.

    Raises:
        ValueError: There is no norm in the model, it is scripted or cannot run on the example
            inputs, norms are unpaired, or a number of groups does not divide. The model is then
            as it was.
    """
    _check_arguments(model, rule, on_unpaired)
    if not inplace:
        model = copy.deepcopy(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if norm_width(module) is not None and not isinstance(module, _INSTANCE_NORMS)
    }
    if not norms:
        kept = sum(isinstance(module, _INSTANCE_NORMS) for module in model.modules())
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm or GroupNorm to convert"
            + (f"; its {kept} InstanceNorms stay as they are" if kept else "")
        )
    calls = {} if example_inputs is None else trace_norms(model, example_inputs)
    feeding = feeding_sources(model, calls)

    plans = []
    for name, norm in norms.items():
        chosen = _matches(name, include) and not _matches(name, exclude)
        positions = calls[norm].positions if norm in calls else None
        plans.append(_plan(name, norm, *feeding[norm], positions, chosen, rule, on_unpaired))
    if on_unpaired == "error":
        _raise_for([row for _, row, _ in plans if row.skipped_reason not in ("", NOT_CHOSEN)])
    model = _apply(model, plans, weight_standardization)
    return Conversion(model, [row for _, row, _ in plans])


def _check_arguments(model: nn.Module, rule: str | int, on_unpaired: str | int) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model must be a module that is not scripted, got {type(model).__name__}")
    if not isinstance(on_unpaired, str):
        check_width("on_unpaired", on_unpaired)
    elif on_unpaired not in ("error", "keep"):
        raise ValueError(
            f"on_unpaired must be 'error', 'keep' or a number of groups; got {on_unpaired!r}"
        )
    PracticalGroupNorm(1, rule=rule)  # raises for an unknown rule


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch(name, pattern) for pattern in patterns)


def _plan(
    name: str,
    norm: nn.Module,
    source: Source | None,
    problem: str,
    positions: int | None,
    chosen: bool,
    rule: str | int,
    on_unpaired: str | int,
) -> _Plan:
    in_channels, layers = (source.in_channels, source.layers) if source else (None, ())
    channels = norm_width(norm) or 0
    row = ConvertedNorm(name, type(norm).__name__, channels, in_channels, layers, None, "")
    if not chosen:
        return norm, replace(row, skipped_reason=NOT_CHOSEN), None
    if source is None and isinstance(on_unpaired, str):
        return norm, replace(row, skipped_reason=problem), None
    new, limited_from = _replacement(norm, row, rule if source else on_unpaired, positions)
    return norm, replace(row, num_groups=new.num_groups, limited_from=limited_from), new


def _raise_for(unpaired: Sequence[ConvertedNorm]) -> None:
    if unpaired:
        described = [
            f"{row.name or 'model'} ({row.was}, {row.num_channels} channels): {row.skipped_reason}"
            for row in unpaired[:5]
        ]
        raise ValueError(
            f"{len(unpaired)} norms could not be paired with the layer that feeds them: "
            f"{'; '.join(described)}. Give example_inputs, leave them out (exclude=...), or "
            f"choose on_unpaired='keep' or a number of groups for them."
        )


def _apply(model: nn.Module, plans: Sequence[_Plan], weight_standardization: bool) -> nn.Module:
    """Put the replacements in place; the model, which may itself be one of the norms."""
    layers = {name: layer for name, layer in model.named_modules() if layer_widths(layer)}
    new = {norm: replacement for norm, _, replacement in plans if replacement}
    for _, row, replacement in plans:
        if replacement and row.layers:
            # Remembered, because the structure alone may tell another story.
            replacement.fed_by = tuple(layers[name] for name in row.layers if name != FUNCTION)
            for layer in replacement.fed_by if weight_standardization else ():
                standardize_layer(layer)
    # With duplicates: a norm may be shared by several places.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and module in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _with_rest(module, new[module]))
    return _with_rest(model, new[model]) if model in new else model


def _replacement(
    norm: nn.Module, row: ConvertedNorm, rule: str | int, positions: int | None
) -> tuple[PracticalGroupNorm, int | None]:
    """The new norm, and what its number of groups was limited from."""
    channels, in_channels = row.num_channels, row.in_channels
    if isinstance(rule, int):
        try:
            check_num_groups(rule, channels)
        except ValueError as e:
            raise ValueError(f"{row.name}: {e}") from None
    affine = isinstance(getattr(norm, "weight", None), torch.Tensor)
    eps: float = norm.eps  # type: ignore[assignment]
    make = partial(PracticalGroupNorm, channels, in_channels, eps=eps, affine=affine)
    new, limited_from = make(rule), None
    if in_channels is None:
        new.resolve(None)
    if isinstance(rule, str) and new.num_groups and positions:
        fitting = [d for d in divisors(channels) if channels // d * positions >= MIN_VALUES] or [1]
        # A conv behind a global pooling: 1x1 maps, and often as many groups as channels.
        if new.num_groups > fitting[-1]:
            new, limited_from = make(fitting[-1]), new.num_groups
    if affine:
        for key, default in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
            value = getattr(norm, key)
            value = default(norm.weight) if value is None else value  # type: ignore[arg-type]
            trains = isinstance(value, nn.Parameter) and value.requires_grad
            setattr(new, key, nn.Parameter(value.detach().clone(), requires_grad=trains))
    new.training = norm.training
    return new, limited_from


def _with_rest(old: nn.Module, norm: PracticalGroupNorm) -> nn.Module:
    """``norm`` followed by what the old norm applied itself: timm's have drop and act in them."""
    rest = [(name, child) for name, child in old.named_children()]
    rest.sort(key=lambda item: item[0] == "act")  # in timm's order: drop, then act
    return nn.Sequential(OrderedDict([("norm", norm), *rest])) if rest else norm
