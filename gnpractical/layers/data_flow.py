"""Which weight layers each tensor of a forward pass comes from.

Every tensor is tagged:

* the output of a convolution or linear layer, module or function, comes from that layer;
* a concatenation along the channels comes from all its parts, whose widths add up: side by side
  they are one layer, like the groups of a grouped convolution;
* of several tensors in one operation (a residual addition) the one that came through the most
  layers counts, of these the one whose layer is the widest, whichever ran first; where one is
  broadcast over another (a gate), the other;
* everything else (activations, norms, pooling, reshaping) passes its input's tag on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gnpractical.layers.pairing import layer_widths, norm_width

# Weight layers as functions: each with the widths (in, out) that a weight and its groups mean.
_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.einsum)
# In the place of a path.
FUNCTION = "(function)"
_CATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Source:
    """The weight layers a tensor comes from.

    Attributes:
        in_channels, out_channels: their widths, added up over concatenated layers.
        layers: their paths in the model, or ``FUNCTION`` for a function without a module.
        order: when the last of them ran.
        depth: how many layers it came through, one after the other.
        input, output: where gradients are found, if there are any: at the input of one layer, at
            its output or that of a concatenation.
        parts: what was concatenated, if there are gradients.
    """

    in_channels: int
    out_channels: int
    layers: tuple[str, ...]
    order: int
    depth: int
    input: GradientEdge | None = field(default=None, compare=False)
    output: GradientEdge | None = field(default=None, compare=False)
    parts: tuple[Tagged, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Tagged:
    """A tensor, its version at the time, and where it comes from."""

    tensor: Tensor
    version: int
    source: Source


@dataclass(frozen=True)
class _Running:
    """A weight layer whose forward is being run, ``order`` and its depth at its start, its input's
    edge."""

    name: str
    layer: nn.Module
    started: int
    depth: int
    input: GradientEdge | None


class DataFlow(TorchFunctionMode):
    """Tags tensors while it is active; subclasses say what is done where a layer or norm begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._sources = WeakTensorKeyDictionary()
        self._running: list[_Running] = []  # weight layers whose forward is being run
        self._order = 0
        self._handles: list[Any] = []

    def at_layer(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, GradientEdge | None]:
        """What a weight layer gets for its input x, and where x's gradient will be found."""
        return x, None

    def at_norm(self, norm: nn.Module, y: Tensor, source: Source | None) -> Tensor:
        """What a norm gets for its input y, which comes from ``source``."""
        raise NotImplementedError

    def __enter__(self) -> DataFlow:
        for name, module in self._model.named_modules():
            if norm_width(module) is not None:
                enter: Callable = self._enter_norm
            elif layer_widths(module) is not None:
                enter = partial(self._enter_layer, name)
                leave = module.register_forward_hook(self._leave_layer, always_call=True)
                self._handles.append(leave)
            else:
                continue
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_layer(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        key, x = _first_tensor(args, kwargs)
        edge, depth = None, 1
        if x is not None:
            depth = self._depth(x) + 1
            x, edge = self.at_layer(layer, x)
            args, kwargs = _with_first(args, kwargs, key, x)
        self._running.append(_Running(name, layer, self._order, depth, edge))
        return args, kwargs

    def _leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        running = self._running.pop()
        if isinstance(output, Tensor) and not self._already_tagged(running, output):
            self._sources[output] = self._layer_source(output, running, running.depth)

    def _enter_norm(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple:
        key, y = _first_tensor(args, kwargs)
        if y is None:
            return args, kwargs
        source = self._source(y)
        running = self._running[-1] if self._running else None
        # Detectron2's norms are inside their convolutions.
        if running and norm in running.layer.children() and not self._already_tagged(running, y):
            source = self._layer_source(y, running, running.depth)
        return _with_first(args, kwargs, key, self.at_norm(norm, y, source))

    def _already_tagged(self, running: _Running, output: Tensor) -> bool:
        """Whether an operation within the layer has tagged ``output`` as the layer's.

        If not, the layer computes by no function known here, and its module stands for it.
        """
        source = self._source(output)
        return source is not None and source.order > running.started

    def _layer_source(
        self,
        output: Tensor,
        running: _Running | None,
        depth: int,
        widths: tuple[int, int] | None = None,
    ) -> Source:
        self._order += 1
        if running is None:
            assert widths is not None
            return Source(*widths, (FUNCTION,), self._order, depth)
        widths = widths or layer_widths(running.layer)
        assert widths is not None
        edges = running.input, _edge(output)
        return Source(*widths, (running.name,), self._order, depth, *edges)

    def _depth(self, value: Any) -> int:
        source = self._source(value)
        return source.depth if source else 0

    def _source(self, value: Any) -> Source | None:
        return self._sources.get(value) if isinstance(value, Tensor) else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = list(tensors_in(result))
        if not outputs:  # most calls only read a shape and the like
            return result
        widths = _function_widths(func, args, kwargs)
        if widths is not None:
            running = self._running[-1] if self._running else None
            depth = self._depth(next(tensors_in((args, kwargs)))) + 1
            self._sources[result] = self._layer_source(result, running, depth, widths)
            return result
        inputs = list(tensors_in((args, kwargs)))
        if func in _PRODUCTS and any(isinstance(t, nn.Parameter) for t in inputs):
            return result  # a weight layer, of which widths are not known: no tag is better
        sources = [self._source(tensor) for tensor in inputs]
        if any(source is not None for source in sources):
            for output in outputs:
                if _joins_channels(func, args, kwargs, output):
                    source = _concatenated_source(inputs, sources, output)
                else:
                    source = _deepest_source(sources, [tensor.shape for tensor in inputs], output)
                if source is not None:
                    self._sources[output] = source
        return result


def _function_widths(func: Callable, args: tuple, kwargs: dict) -> tuple[int, int] | None:
    if func is not F.linear and func not in _PLAIN and func not in _TRANSPOSED:
        return None
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    if func is F.linear:
        return weight.shape[1], weight.shape[0]
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if func in _TRANSPOSED:
        return weight.shape[0], weight.shape[1] * groups
    return weight.shape[1] * groups, weight.shape[0]


def _joins_channels(func: Callable, args: tuple, kwargs: dict, output: Tensor) -> bool:
    if func not in _CATENATIONS:
        return False
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return dim % output.dim() == 1


def _concatenated_source(
    tensors: list[Tensor], sources: list[Source | None], output: Tensor
) -> Source | None:
    parts = [Tagged(t, t._version, s) for t, s in zip(tensors, sources, strict=True) if s]
    if len(parts) < len(sources):
        return None
    return Source(
        sum(part.source.in_channels for part in parts),
        sum(part.source.out_channels for part in parts),
        tuple(name for part in parts for name in part.source.layers),
        max(part.source.order for part in parts),
        max(part.source.depth for part in parts),
        output=_edge(output),
        parts=tuple(parts) if output.requires_grad else (),  # else nothing will ask for them
    )


def _deepest_source(
    sources: list[Source | None], shapes: list[torch.Size], output: Tensor
) -> Source:
    # What is broadcast over the others (a gate, a scale) does not say where the values come from.
    whole = [s for s, shape in zip(sources, shapes, strict=True) if s and shape == output.shape]
    candidates = whole or [source for source in sources if source is not None]
    return max(candidates, key=lambda s: (s.depth, s.in_channels, s.out_channels, s.order))


def _edge(output: Tensor) -> GradientEdge | None:
    return get_gradient_edge(output) if output.requires_grad else None


def _first_tensor(args: tuple, kwargs: dict) -> tuple[int | str, Tensor | None]:
    """The first argument, by place or as ``input`` or ``x``, if it is a tensor."""
    if args:
        return 0, args[0] if isinstance(args[0], Tensor) else None
    for key in ("input", "x"):
        if isinstance(kwargs.get(key), Tensor):
            return key, kwargs[key]
    return 0, None


def _with_first(args: tuple, kwargs: dict, key: int | str, x: Tensor) -> tuple[tuple, dict]:
    return ((x, *args[1:]), kwargs) if isinstance(key, int) else (args, kwargs | {key: x})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
