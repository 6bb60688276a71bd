"""Which weight layer feeds which norm, read off the structure of the modules.

Three structures cover Detectron2's models and most others:

* the norm follows the weight layer in an ``nn.Sequential``;
* the norm and the weight layer are attributes of one module: a norm takes the last layer before it
  that no earlier norm has taken;
* the norm is a child of the weight layer (Detectron2's ``Conv2d(..., norm=...)``).

Importing this module registers one hook with PyTorch (``register_module_module_registration_hook``)
through which an unresolved :class:`PracticalGroupNorm` learns ``in_channels`` at the moment it is
registered. For every other module the hook is one ``isinstance`` test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parameter import is_lazy

from gnpractical.layers.group_norm import MEASURED, PracticalGroupNorm


@dataclass(frozen=True)
class NormPair:
    """A norm of a model and the weight layers that feed it.

    Attributes:
        norm_name: Path of the norm.
        norm: The norm itself.
        layers: The layers by path. There is none where none was found, or where a function
            without a module feeds the norm; several where their outputs are concatenated.
    """

    norm_name: str
    norm: nn.Module
    layers: dict[str, nn.Module]


def check_model(model: nn.Module) -> None:
    """TypeError unless ``model`` is a module of PyTorch's."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def layer_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) full channel counts of a weight layer, None for any other module.

    Goes by attributes, not by class: Detectron2's deformable convolutions are not
    ``torch.nn`` convolutions. ``kernel_size`` tells a convolution from a block that merely
    records its widths, such as Detectron2's ``CNNBlockBase``.
    """
    own = vars(module)  # not getattr: wrappers answer for what they wrap
    kind = "features" if "in_features" in own else "channels"
    if kind == "channels" and "kernel_size" not in own:
        return None
    widths = own.get(f"in_{kind}"), own.get(f"out_{kind}")
    if all(isinstance(w, int) and w > 0 for w in widths):
        return widths  # type: ignore[return-value]
    return None  # a lazy layer's are 0 until its first call


def norm_width(module: nn.Module) -> int | None:
    """Channels of a normalization layer (GroupNorm, BatchNorm and its kin), else None."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    # BatchNorm, SyncBatchNorm, and the frozen ones, which share no base class with them.
    if not hasattr(module, "running_mean"):
        return None
    width = getattr(module, "num_features", None)
    if width is None and isinstance(module.running_mean, Tensor):  # torchvision's frozen one
        width = module.running_mean.numel()
    return width if isinstance(width, int) else None


def find_pairs(model: nn.Module) -> list[NormPair]:
    """Every norm of ``model``, in registration order, with the layers that feed it.

    This is the one answer to the question which layers feed a norm: conversion, the group report,
    the record in checkpoints and weight standardization all ask it. It is what ``convert`` found
    and remembered in the norm's ``fed_by``, as long as these layers are in the model, or else what
    the structure says.
    """
    check_model(model)
    paths = {module: name for name, module in model.named_modules()}
    pairs: dict[nn.Module, NormPair] = {}
    if norm_width(model) is not None:
        pairs[model] = NormPair("", model, {})
    for parent_name, parent in model.named_modules():
        before: list[tuple[str, nn.Module]] = []
        for name, child in parent.named_children():
            width = norm_width(child)
            if width is not None:
                layers = getattr(child, "fed_by", None)
                if layers is None or not all(layer in paths for layer in layers):
                    layer_name = _feeding_layer(parent, before, width)
                    layers = () if layer_name is None else (parent.get_submodule(layer_name),)
                pair = NormPair(_join(parent_name, name), child, {paths[m]: m for m in layers})
                first = pairs.setdefault(child, pair)
                # Several places share this norm, behind layers that do not agree.
                if _in_widths(first) != _in_widths(pair):
                    first.layers.clear()
            before.append((name, child))
    return list(pairs.values())


def require_resolved(model: nn.Module) -> None:
    """Raise ValueError, naming each, if ``model`` has norms without a number of groups.

    Norms yet to be calibrated pass where the layer that feeds them is known.
    """
    unresolved = [
        f"{p.norm_name} ({p.norm.norm_name}, {p.norm.num_channels} channels)"
        for p in find_pairs(model)
        if isinstance(p.norm, PracticalGroupNorm)
        and p.norm.num_groups is None
        and not (p.norm.rule == MEASURED and p.norm.in_channels)
    ]
    if unresolved:
        raise ValueError(
            f"{len(unresolved)} norms have no number of groups, because no weight layer was found "
            f"that feeds them: {', '.join(unresolved)}. Call gnpractical.resolve_norms(model, "
            f"example_inputs), register each right after its conv or linear layer, or use a fixed "
            f"GN_<k> there."
        )


def _in_widths(pair: NormPair) -> list[int]:
    return [widths[0] for layer in pair.layers.values() if (widths := layer_widths(layer))]


def _feeding_layer(
    parent: nn.Module, before: Iterable[tuple[str, nn.Module]], num_channels: int
) -> str | None:
    """Name, within ``parent``, of the layer that feeds a norm registered after ``before``.

    "" is the parent itself. None: no layer fits, or several fit and differ in input width, so
    that any choice would be a guess.
    """
    waiting: list[tuple[str, tuple[int, int]]] = []  # layers no norm has followed yet
    for name, sibling in before:
        widths, width = layer_widths(sibling), norm_width(sibling)
        if widths is not None:
            waiting.append((name, widths))
        elif width is not None:
            fed = [entry for entry in waiting if entry[1][1] == width]
            in_channels = getattr(sibling, "in_channels", None)
            known = [entry for entry in fed if entry[1][0] == in_channels]
            if known or len({entry[1][0] for entry in fed}) == 1:
                waiting.remove((known or fed)[-1])
            else:  # which of them that norm follows is not known, so none of them is free
                waiting = [entry for entry in waiting if entry not in fed]
        elif _has_weights(sibling):  # its output, of unknown width, may be what reaches the norm
            waiting.clear()
    if isinstance(parent, nn.Sequential):
        waiting = waiting[-1:]
    fits = [(name, widths) for name, widths in waiting if widths[1] == num_channels]
    if fits:
        return fits[-1][0] if len({widths[0] for _, widths in fits}) == 1 else None
    own = layer_widths(parent)
    return "" if own is not None and own[1] == num_channels else None


def _has_weights(module: nn.Module) -> bool:
    return any(is_lazy(p) or p.dim() > 1 for p in module.parameters())


def _resolve_on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if not isinstance(child, PracticalGroupNorm) or child.num_groups is not None:
        return
    if child.in_channels is not None:  # known already, though not yet calibrated
        return
    # A norm that takes another's place was not registered last.
    before = takewhile(lambda entry: entry[0] != name, parent.named_children())
    layer_name = _feeding_layer(parent, before, child.num_channels)
    if layer_name is not None:
        layer = parent.get_submodule(layer_name)
        widths = layer_widths(layer)
        assert widths is not None
        text = f"the norm of {type(layer).__name__}({widths[0]}, {widths[1]})"
        if layer is not parent:
            text += f" in {type(parent).__name__}"
        child.resolve(widths[0], layer=text)
    elif not child.needs_in_channels:
        child.resolve(None, layer=f"{type(parent).__name__}.{name}")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


register_module_module_registration_hook(_resolve_on_registration)
