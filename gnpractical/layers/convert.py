"""Any model's BatchNorms and GroupNorms as GroupNorms with per-layer group counts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from gnpractical.layers.data_flow import Source
from gnpractical.layers.group_norm import MIN_VALUES, PracticalGroupNorm
from gnpractical.layers.norm_calls import NormCalls, trace_norms
from gnpractical.layers.pairing import find_pairs, layer_widths, norm_width
from gnpractical.layers.weight_standardization import standardize_layer
from gnpractical.num_groups import check_num_groups, check_width, divisors


@dataclass(frozen=True)
class ConvertedNorm:
    """What became of one norm.

    Attributes:
        name: its path.
        was: its class before.
        num_channels: C.
        in_channels: input width of the layers that feed it, None where they are not known.
        layers: paths of these layers; "" stands for a function without a module.
        num_groups: G; None for a norm that was left, or is yet to be calibrated.
        left: why it was left as it was, "" for a converted norm.
        limited_from: what the rule gives, where that left fewer than ``MIN_VALUES`` values to a
            group on the example inputs and a smaller G was taken.
    """

    name: str
    was: str
    num_channels: int
    in_channels: int | None
    layers: tuple[str, ...]
    num_groups: int | None
    left: str
    limited_from: int | None = None


@dataclass(frozen=True)
class Conversion:
    """A converted model and a row for each of its norms, in registration order."""

    model: nn.Module
    norms: list[ConvertedNorm]

    def __str__(self) -> str:
        table = [
            [n.name, n.was, n.in_channels, n.num_channels, n.num_groups,
             ", ".join(layer or "(function)" for layer in n.layers),
             n.left or (f"limited from G={n.limited_from}" if n.limited_from else "")]
            for n in self.norms
        ]  # fmt: skip
        converted = sum(not norm.left for norm in self.norms)
        headers = ["norm", "was", "in", "out", "G", "fed by", "note"]
        text = tabulate(table, headers, missingval="-", disable_numparse=[0, 5])
        return f"{text}\n{converted} of {len(self.norms)} norms converted"


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    rule: str | int = "practical",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    on_unpaired: str | int = "error",
    weight_standardization: bool = False,
    inplace: bool = True,
) -> Conversion:
    """Replace every BatchNorm and GroupNorm of ``model`` by a :class:`PracticalGroupNorm`.

    BatchNorm1d, 2d and 3d, SyncBatchNorm, the frozen ones of torchvision and Detectron2, and
    GroupNorm. Weight and bias keep their values and ``requires_grad`` (a frozen norm's become
    parameters that do not train); running statistics are dropped, so that the outputs change
    and the model needs training. Not for InstanceNorm and LayerNorm, which stay.

    Args:
        model: any model that is not scripted.
        example_inputs: what the model runs on once, in evaluation mode: a tensor, a tuple of
            positional arguments or a dict of keyword arguments. With it the layers that feed each
            norm are found by data flow (see ``data_flow``), without it by structure (see
            ``pairing``). Norms that do not run, as those used in training only, go by structure.
        rule: as :class:`PracticalGroupNorm`'s. A width rule's number is lowered where the example
            inputs show fewer than ``MIN_VALUES`` values to a group.
        include, exclude: patterns of norm paths, such as ``"backbone.*"``; the others are left.
        on_unpaired: for a norm whose feeding layer is not known or not unique: "error", "keep"
            (leave it), or a number of groups.
        weight_standardization: standardize the convolutions that feed converted norms.
        inplace: change ``model`` itself, else a copy.

    Raises:
        ValueError: no norm in the model, a scripted model, unpaired norms, numbers of groups that
            do not divide, example inputs the model cannot run on. The model is as it was.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model must be a module that is not scripted, got {type(model).__name__}")
    if isinstance(on_unpaired, str):
        if on_unpaired not in ("error", "keep"):
            raise ValueError(
                f"on_unpaired must be 'error', 'keep' or a number of groups; got {on_unpaired!r}"
            )
    else:
        check_width("on_unpaired", on_unpaired)
    PracticalGroupNorm(1, rule=rule)  # an unknown rule is an error before anything is done
    if not inplace:
        model = copy.deepcopy(model)
    if not _norms(model):
        raise ValueError(f"{type(model).__name__} has no BatchNorm or GroupNorm to convert")
    calls = {} if example_inputs is None else trace_norms(model, example_inputs)
    feeding = _feeding_sources(model, calls)
    rows, new, unpaired = [], {}, []
    for name, norm in _norms(model):
        if norm in new:  # one norm at two paths
            continue
        channels = norm_width(norm)
        assert channels is not None
        source, problem = feeding.get(norm, (None, "it is the whole model"))
        chosen = any(fnmatch(name, p) for p in include) and not any(
            fnmatch(name, p) for p in exclude
        )
        left = "" if chosen else "not chosen by include and exclude"
        if chosen and source is None and on_unpaired == "error":
            of = f"{type(norm).__name__}, {channels} channels"
            unpaired.append(f"{name or 'model'} ({of}): {problem}")
        elif chosen and source is None and on_unpaired == "keep":
            left = problem
        replacement, limited_from = None, None
        if not left and not unpaired:
            positions = calls[norm].positions if norm in calls else None
            replacement, limited_from = _replacement(
                norm, name, channels, source, rule if source else int(on_unpaired), positions
            )
            new[norm] = replacement
        rows.append(
            ConvertedNorm(
                name, type(norm).__name__, channels, source.in_channels if source else None,
                source.layers if source else (),
                replacement.num_groups if replacement else None, left, limited_from,
            )
        )  # fmt: skip
    if unpaired:
        raise ValueError(
            f"{len(unpaired)} norms could not be paired with the layer that feeds them: "
            f"{'; '.join(unpaired[:5])}. Give example_inputs, leave them out (exclude=...), or "
            f"choose on_unpaired='keep' or a number of groups for them."
        )
    layers = {layer for row in rows if not row.left for layer in row.layers if layer}
    model = _replace(model, new)
    if weight_standardization:
        for layer in layers:
            standardize_layer(model.get_submodule(layer))
    return Conversion(model, rows)


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if norm_width(module) is not None and not isinstance(module, _InstanceNorm)
    ]


def _feeding_sources(
    model: nn.Module, calls: dict[nn.Module, NormCalls]
) -> dict[nn.Module, tuple[Source | None, str]]:
    """For every norm the layers that feed it, or None and why they are not known."""
    feeding: dict[nn.Module, tuple[Source | None, str]] = {}
    for pair in find_pairs(model):
        norm = pair.norm
        if norm in calls:
            feeding[norm] = _one_source(calls[norm].sources, norm_width(norm))
        elif norm not in feeding or feeding[norm][0] is None:
            source = None
            if pair.layer is not None and pair.layer_name is not None:
                widths = layer_widths(pair.layer)
                source = Source(*widths, (pair.layer_name,), 0) if widths else None
            feeding[norm] = source, "no layer before it in its module feeds it"
    return feeding


def _one_source(
    sources: list[Source | None], num_channels: int | None
) -> tuple[Source | None, str]:
    first = sources[0]
    if None in sources or first is None:
        return None, "the model's input reaches it without a weight layer"
    if len({source.in_channels for source in sources if source}) > 1:
        return None, "it is called several times, after layers of different input widths"
    if first.out_channels != num_channels:
        return None, (
            f"what reaches it comes from {first.out_channels} output channels "
            f"({', '.join(first.layers[:3])}), not from its own number"
        )
    return first, ""


def _replacement(
    norm: nn.Module,
    name: str,
    channels: int,
    source: Source | None,
    rule: str | int,
    positions: int | None,
) -> tuple[PracticalGroupNorm, int | None]:
    """The new norm, and what its number of groups was limited from."""
    if isinstance(rule, int):
        try:
            check_num_groups(rule, channels)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    in_channels = source.in_channels if source else None
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


def _replace(model: nn.Module, new: dict[nn.Module, PracticalGroupNorm]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() names a module once
            if child in new:
                setattr(parent, name, _with_rest(child, new[child]))
    return _with_rest(model, new[model]) if model in new else model


def _with_rest(old: nn.Module, norm: PracticalGroupNorm) -> nn.Module:
    """``norm`` followed by what the old norm applied itself: timm's have drop and act in them."""
    rest = [(name, child) for name, child in old.named_children()]
    rest.sort(key=lambda item: item[0] == "act")  # in timm's order: drop, then act
    return nn.Sequential(OrderedDict([("norm", norm), *rest])) if rest else norm
