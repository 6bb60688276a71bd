"""Which weight layer's output reaches each norm, found by running the model on example inputs.

Every tensor of the forward pass is tagged with the weight layers it comes from:

* the output of a convolution or linear layer, module or function, comes from that layer;
* a concatenation along the channels comes from all its parts, whose widths add up: side by side
  they are one layer, like the groups of a grouped convolution;
* of several tensors in one operation (a residual addition) the one whose layer ran last counts;
  where one is broadcast over another (a gate), the other;
* everything else (activations, norms, pooling, reshaping) passes its input's tag on.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gnpractical.layers.pairing import layer_widths, norm_width

# Weight layers as functions: each with the widths (in, out) that a weight and its groups mean.
_PLAIN = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_CATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Source:
    """The weight layers a tensor comes from.

    Attributes:
        in_channels, out_channels: their widths, added up over concatenated layers.
        layers: their paths in the model; "" stands for a function without a module.
        order: when the last of them ran.
    """

    in_channels: int
    out_channels: int
    layers: tuple[str, ...]
    order: int


@dataclass
class NormCalls:
    """The calls of one norm.

    Attributes:
        sources: of its inputs, each once; None for an input that no weight layer has touched.
        positions: the smallest number of values a channel of its inputs had, such as H W.
    """

    sources: list[Source | None]
    positions: int


def trace_norms(model: nn.Module, example_inputs: Any) -> dict[nn.Module, NormCalls]:
    """The calls of every norm that runs.

    Args:
        model: runs once, in evaluation mode and without gradients; unchanged afterwards.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: the model could not run on these inputs; the message has PyTorch's.
    """
    args: tuple = (example_inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    with _evaluating(model), torch.no_grad(), _Tracer(model) as tracer:
        try:
            model(*args, **kwargs)
        except Exception as e:  # whatever the model's own code raises
            reason = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
            raise ValueError(
                f"{type(model).__name__} cannot run on the example inputs "
                f"({type(example_inputs).__name__}, tensors of shape {_shapes(example_inputs)}"
                f"{_devices(_tensors(example_inputs))}): {reason.rstrip(' :.')}. Its forward takes "
                f"{inspect.signature(model.forward)}{_devices(model.parameters())}; give a tensor, "
                f"a tuple of positional arguments or a dict of keyword arguments."
            ) from e
    return tracer.found


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[nn.Module, NormCalls] = {}
        self._model = model
        self._running: list[str] = []  # weight layers whose forward is being run
        self._order = 0
        self._handles: list[Any] = []

    def __enter__(self) -> _Tracer:
        for name, module in self._model.named_modules():
            if norm_width(module) is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter_norm))
            elif layer_widths(module) is not None:
                enter, leave = self._layer_hooks(name)
                self._handles.append(module.register_forward_pre_hook(enter))
                self._handles.append(module.register_forward_hook(leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _layer_hooks(self, name: str) -> tuple[Callable, Callable]:
        started: list[int] = []

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(name)
            started.append(self._order)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            source, widths = _source(output), layer_widths(module)
            ran = source is not None and source.order > started.pop()
            if isinstance(output, Tensor) and not ran and widths is not None:
                self._tag(output, *widths, name)  # its operation is none of the known functions

        return enter, leave

    def _enter_norm(self, norm: nn.Module, args: Any) -> None:
        if not args:
            return
        source, positions = _source(args[0]), math.prod(args[0].shape[2:])
        calls = self.found.setdefault(norm, NormCalls([], positions))
        calls.positions = min(calls.positions, positions)
        if source not in calls.sources:
            calls.sources.append(source)

    def _tag(self, tensor: Tensor, in_channels: int, out_channels: int, name: str) -> None:
        self._order += 1
        tensor._gnp_source = Source(  # type: ignore[attr-defined]
            in_channels, out_channels, (name,), self._order
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        sources = [_source(tensor) for tensor in inputs]
        shapes = [tensor.shape for tensor in inputs]
        result = func(*args, **kwargs)
        widths = _function_widths(func, args, kwargs)
        if widths is not None:
            if isinstance(result, Tensor):
                self._tag(result, *widths, self._running[-1] if self._running else "")
        elif any(source is not None for source in sources):
            for output in _tensors(result):
                source = _passed_on(func, args, kwargs, sources, shapes, output)
                if source is not None:
                    output._gnp_source = source  # type: ignore[attr-defined]
        return result


def _function_widths(func: Callable, args: tuple, kwargs: dict) -> tuple[int, int] | None:
    if func is not F.linear and func not in _PLAIN and func not in _TRANSPOSED:
        return None
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    if func is F.linear:
        return weight.shape[1], weight.shape[0]
    if func in _TRANSPOSED:
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        return weight.shape[0], weight.shape[1] * groups
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    return weight.shape[1] * groups, weight.shape[0]


def _passed_on(
    func: Callable,
    args: tuple,
    kwargs: dict,
    sources: list[Source | None],
    shapes: list[torch.Size],
    output: Tensor,
) -> Source | None:
    if func in _CATENATIONS:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if dim % output.dim() == 1:
            if None in sources:
                return None
            parts = [source for source in sources if source is not None]
            return Source(
                sum(part.in_channels for part in parts),
                sum(part.out_channels for part in parts),
                tuple(name for part in parts for name in part.layers),
                max(part.order for part in parts),
            )
    # What is broadcast over the others (a gate, a scale) does not say where the values come from.
    whole = [s for s, shape in zip(sources, shapes, strict=True) if s and shape == output.shape]
    candidates = whole or [source for source in sources if source is not None]
    return max(candidates, key=lambda source: source.order)


def _source(value: Any) -> Source | None:
    return getattr(value, "_gnp_source", None) if isinstance(value, Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(value)]


def _devices(tensors: Iterable[Tensor]) -> str:
    devices = sorted({str(tensor.device) for tensor in tensors})
    return f" on {', '.join(devices)}" if devices else ""


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
