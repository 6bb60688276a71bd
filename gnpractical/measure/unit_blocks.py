"""Running a model and recording its unit blocks: what enters and leaves them, and the gradients.

Nothing about the model changes: parameters, gradients, buffers, modes and the random state are as
before, and hooks are removed, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gnpractical.layers.activations import ACTIVATION_FUNCTIONS
from gnpractical.layers.data_flow import DataFlow, Source, Tagged, tensors_in
from gnpractical.layers.pairing import check_model, norm_width
from gnpractical.layers.unchanged import unchanged

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Activation:
    """The activation that follows a norm directly: its name, and where gradients enter it."""

    name: str
    end: GradientEdge | None


@dataclass
class _ForwardCall:
    """One call of a unit block in a forward pass: x -> layer -> y -> norm -> z -> activation.

    Attributes:
        fed: y (N, C, *), still part of the graph that leads to the layers it comes from.
        layer_edges: The edges of y and x where y is one layer's very output, else ().
        norm_start: The edge of an alias of y, where only this norm's gradient arrives.
        norm_end: The edge of z.
        activation: What follows, None while nothing is known to follow.
    """

    norm: nn.Module
    fed: Tagged
    layer_edges: tuple[GradientEdge, ...]
    norm_start: GradientEdge
    norm_end: GradientEdge
    activation: Activation | None = None

    @property
    def block_end(self) -> GradientEdge:
        return (self.activation and self.activation.end) or self.norm_end


@dataclass(frozen=True)
class BlockCall:
    """One call of a unit block, and the gradients that reached it.

    Attributes:
        fed: The norm's input (N, C, *), still part of the graph that leads to the layers it comes
            from.
        activation: What follows the norm directly, or None.
        output_grad: The gradient at the block's end.
        norm_grad: The gradient at the norm's input that flows back through this norm alone.
        input_grad: The gradient at the layer's input, if it came without further work.
    """

    norm: nn.Module
    fed: Tagged
    activation: Activation | None
    output_grad: Tensor
    norm_grad: Tensor
    input_grad: Tensor | None

    def input_gradients(self) -> list[Tensor]:
        """dL/dx at the input of each feeding layer, of what flows back through this norm alone.

        [] where none arrives, as through a detached tensor or a reentrant checkpoint.
        """
        if self.input_grad is not None:
            return [self.input_grad]
        return _gradients(self.fed, self.norm_grad)


def run_batches(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> Generator[list[BlockCall], None, None]:
    """For each batch the calls of unit blocks that a gradient reached, their graph still alive.

    Close the generator (``contextlib.closing``): the model is restored when it ends.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list of batches, got {type(batches).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model and a batch, got {loss!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients cannot be measured inside torch.inference_mode()")
    find_norms(model)
    none = True
    with unchanged(model, training=True):
        for batch in batches:
            none = False
            calls = _run(model, batch, loss or _default_loss)
            yield calls
            calls.clear()  # whoever still holds the list: this graph ends before the next one grows
    if none:
        raise ValueError("There are no batches to measure on; at least one is required.")


def find_norms(model: nn.Module) -> dict[nn.Module, str]:
    """The norms of ``model`` and their paths; ValueError if there are none."""
    check_model(model)
    norms = {m: name for name, m in model.named_modules() if norm_width(m) is not None}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no unit block: there is no norm in it.")
    return norms


class BlockFlow(DataFlow):
    """Sees which activation follows each norm, be it a module or, as in most models, a function.

    Subclasses say what a call of a norm is: anything with an attribute ``activation``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Norm outputs: the tensor (which keeps its id its own), its version and its call.
        self._norm_outputs: dict[int, tuple[Tensor, int, Any]] = {}

    def left_norm(self, norm: nn.Module, output: Tensor) -> Any:
        """The call that ``output`` ends, or None if it is of no interest."""
        raise NotImplementedError

    def __enter__(self) -> DataFlow:
        for norm in find_norms(self._model):
            self._handles.append(norm.register_forward_hook(self._leave_norm))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._norm_outputs.clear()

    def _leave_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        call = self.left_norm(norm, output)
        if call is not None:
            self._norm_outputs[id(output)] = output, output._version, call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [
            entry
            for tensor in tensors_in((args, kwargs))
            if (entry := self._norm_outputs.get(id(tensor))) and tensor._version == entry[1]
        ]
        result = super().__torch_function__(func, types, args, kwargs)
        # Reading a shape is no use; nor is what no gradient comes back from.
        if used and isinstance(result, Tensor):
            if result.requires_grad or not torch.is_grad_enabled():
                for tensor, _, call in used:
                    self._use(func, args, result, tensor, call)
        return result

    def _use(self, func: Callable, args: tuple, result: Tensor, tensor: Tensor, call: Any) -> None:
        """An operation reads a norm's output: its activation, if that is the only one to do so."""
        if call.activation is None and func in ACTIVATION_FUNCTIONS and args and args[0] is tensor:
            end = get_gradient_edge(result) if result.requires_grad else None
            call.activation = Activation(ACTIVATION_FUNCTIONS[func], end)
            if result is tensor:  # in place: from here on this tensor is the activation's output
                self._norm_outputs.pop(id(tensor), None)
        else:
            call.activation = None
            self._norm_outputs.pop(id(tensor), None)


class _Recorder(BlockFlow):
    """Notes the calls of unit blocks while it is active, with the places of their gradients.

    Layers and norms get aliases of their inputs, so that what flows back through each alone can be
    told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._entered: dict[nn.Module, Callable[..., _ForwardCall]] = {}
        self.calls: list[_ForwardCall] = []

    def at_layer(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, GradientEdge | None]:
        if not x.is_floating_point() or not torch.is_grad_enabled():
            return x, None
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return x, get_gradient_edge(x)

    def at_norm(self, norm: nn.Module, y: Tensor, source: Source | None) -> Tensor:
        if source is None or not y.requires_grad or not y.numel():
            return y
        alias = y.view_as(y)
        layer_edges: tuple[GradientEdge, ...] = ()
        if source.input and source.output == (edge := get_gradient_edge(y)):
            layer_edges = edge, source.input
        fed = Tagged(y, y._version, source)
        self._entered[norm] = partial(
            _ForwardCall, norm, fed, layer_edges, get_gradient_edge(alias)
        )
        return alias

    def left_norm(self, norm: nn.Module, output: Tensor) -> _ForwardCall | None:
        entered = self._entered.pop(norm, None)
        if entered is None:
            return None
        self.calls.append(entered(get_gradient_edge(output)))
        return self.calls[-1]


def _gradients(at: Tagged, gradient: Tensor) -> list[Tensor]:
    """What ``gradient`` at a tensor is at the input of each layer that the tensor comes from.

    Part by part, because one part of a concatenation may have been computed from another. [] where
    none arrives at one of the layers.
    """
    tensor, parts = at.tensor, at.source.parts
    edge = at.source.output if parts else at.source.input
    # Changed in place since: the graph behind it is no longer that of the tensor that was tagged.
    if edge is None or not tensor.requires_grad or tensor._version != at.version:
        return []
    (gradient,) = torch.autograd.grad(tensor, edge, gradient, retain_graph=True, allow_unused=True)
    if gradient is None or not parts:
        return [] if gradient is None else [gradient]
    pieces = gradient.split([part.tensor.shape[1] for part in parts], 1)
    found = [_gradients(part, piece) for part, piece in zip(parts, pieces, strict=True)]
    return [g for of_part in found for g in of_part] if all(found) else []


def _run(model: nn.Module, batch: Any, loss: Loss) -> list[BlockCall]:
    """The calls of one forward pass that a gradient reached, with the gradients."""
    recorder = _Recorder(model)
    with recorder:
        value = _loss_value(model, batch, loss)
    if not recorder.calls:
        return []
    edges = [
        edge
        for call in recorder.calls
        for edge in (call.norm_start, call.block_end, *call.layer_edges)
    ]
    gradients = iter(torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True))
    calls = []
    for call in recorder.calls:
        norm_grad, output_grad = next(gradients), next(gradients)
        y_grad, x_grad = (next(gradients), next(gradients)) if call.layer_edges else (None, None)
        if norm_grad is None or output_grad is None:
            continue
        # Almost always nothing but the norm reads the layer's output; then no more is to be done.
        direct = y_grad is not None and torch.equal(y_grad, norm_grad)
        input_grad = x_grad if direct else None
        calls.append(
            BlockCall(call.norm, call.fed, call.activation, output_grad, norm_grad, input_grad)
        )
    return calls


def _loss_value(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its reducer waits for weight gradients, of which there are none
    with torch.enable_grad():
        value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the loss must be a scalar tensor, got {what}: pass loss=, a function of the model "
            f"and a batch, such as lambda model, batch: "
            f"F.cross_entropy(model(batch[0]), batch[1])"
        )
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: it is detached, constant or under no_grad")
    if not torch.isfinite(value):
        raise ValueError(f"the loss is {value.item()}: there are no gradients to measure")
    return value


def _default_loss(model: nn.Module, batch: Any) -> Any:
    output = model(batch)
    if isinstance(output, dict) and all(isinstance(v, Tensor) for v in output.values()):
        return sum(output.values())
    return output
