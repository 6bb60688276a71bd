"""Running a model and recording its unit blocks: what enters and leaves them, and the gradients.

Nothing about the model changes: parameters, gradients, buffers, modes and the random state are as
before, and hooks are removed, also after an error.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gnpractical.layers.activations import ACTIVATION_FUNCTIONS
from gnpractical.layers.data_flow import DataFlow, Source
from gnpractical.layers.pairing import norm_width

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class BlockCall:
    """One call of a unit block in a forward pass, and the gradients at the norm and the output.

    ``norm_input`` (N, C, *) is still part of the graph that leads to the layers it comes from.
    """

    norm: nn.Module
    source: Source
    norm_input: Tensor
    norm_edge: GradientEdge
    output: GradientEdge
    norm_output: GradientEdge | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    activation_name: str | None = None
    norm_grad: Tensor | None = None
    output_grad: Tensor | None = None

    def input_gradients(self, norm_grad: Tensor) -> list[Tensor]:
        """dL/dx at the input of each feeding layer, for dL/dy = ``norm_grad`` at the norm's input.

        [] where none arrives, as through a detached tensor or a reentrant checkpoint.
        """
        return list(_gradients(self.norm_input, self.source, norm_grad))


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
    with _unchanged(model):
        for batch in batches:
            none = False
            calls = _run(model, batch, loss or _default_loss)
            yield calls
            calls.clear()  # whoever still holds the list: this graph ends before the next one grows
    if none:
        raise ValueError("There are no batches to measure on; at least one is required.")


def find_norms(model: nn.Module) -> dict[nn.Module, str]:
    """The norms of ``model`` and their paths; ValueError if there are none."""
    norms = {m: name for name, m in model.named_modules() if norm_width(m) is not None}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no unit block: there is no norm in it.")
    return norms


class _Recorder(DataFlow):
    """Notes the calls of unit blocks while it is active.

    Layers and norms get aliases of their inputs, so that what flows back through each alone can be
    told apart. As a mode it also sees activations that are plain functions, as most of
    Detectron2's and torchvision's are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Norm outputs: the tensor (which keeps its id its own), its version and its call.
        self._norm_outputs: dict[int, tuple[Tensor, int, BlockCall]] = {}
        self._entered: dict[nn.Module, tuple[Source, Tensor, GradientEdge]] = {}
        self.calls: list[BlockCall] = []

    def __enter__(self) -> DataFlow:
        for norm in find_norms(self._model):
            self._handles.append(norm.register_forward_hook(self._leave_norm))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._norm_outputs.clear()

    def at_layer(self, x: Tensor) -> tuple[Tensor, GradientEdge | None]:
        if not x.is_floating_point() or not torch.is_grad_enabled():
            return x, None
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return x, get_gradient_edge(x)

    def at_norm(self, norm: nn.Module, y: Tensor, source: Source | None) -> Tensor:
        if source is None or not y.requires_grad or not y.numel():
            return y
        alias = y.view_as(y)
        self._entered[norm] = source, y, get_gradient_edge(alias)
        return alias

    def _leave_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        entered = self._entered.pop(norm, None)
        if entered is not None:
            call = BlockCall(norm, *entered, output=get_gradient_edge(output))
            self._norm_outputs[id(output)] = output, output._version, call
            self.calls.append(call)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [
            entry
            for tensor in (*args, *kwargs.values())
            if (entry := self._norm_outputs.get(id(tensor))) and tensor._version == entry[1]
        ]
        result = super().__torch_function__(func, types, args, kwargs)
        # Reading a shape is no use; nor is what no gradient comes back from.
        if used and isinstance(result, Tensor) and result.requires_grad:
            for entry in used:
                self._use(func, args, kwargs, result, *entry)
        return result

    def _use(self, func, args, kwargs, result, tensor, version, call) -> None:
        """An operation reads a norm's output: its activation, if that is the only one to do so."""
        if call.activation is None and func in ACTIVATION_FUNCTIONS and args and args[0] is tensor:
            rest = args[1:]
            call.norm_output = call.output
            call.output = get_gradient_edge(result)
            call.activation = lambda z: func(z, *rest, **kwargs)
            call.activation_name = ACTIVATION_FUNCTIONS[func]
            if result is tensor:  # in place: from here on this tensor is the activation's output
                self._norm_outputs.pop(id(tensor), None)
        else:
            if call.norm_output is not None:
                call.output = call.norm_output
            call.activation = call.activation_name = None
            self._norm_outputs.pop(id(tensor), None)


def _gradients(tensor: Tensor, source: Source, gradient: Tensor) -> Iterator[Tensor]:
    """What ``gradient`` at ``tensor`` is at the inputs of the layers that ``tensor`` comes from.

    Part by part: the layers of one part of a concatenation may come before those of another.
    """
    if source.edge is None:
        return
    (gradient,) = torch.autograd.grad(
        tensor, source.edge, gradient, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        return
    if not source.parts:
        yield gradient
        return
    pieces = gradient.split([part.tensor.shape[1] for part in source.parts], 1)
    for part, piece in zip(source.parts, pieces, strict=True):
        if part.tensor._version == part.version:
            yield from _gradients(part.tensor, part.source, piece)


def _run(model: nn.Module, batch: Any, loss: Loss) -> list[BlockCall]:
    """The calls of one forward pass that a gradient reached, with the gradients."""
    recorder = _Recorder(model)
    with recorder:
        value = _loss_value(model, batch, loss)
    if not recorder.calls:
        return []
    edges = [edge for call in recorder.calls for edge in (call.norm_edge, call.output)]
    gradients = torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True)
    for call, y, out in zip(recorder.calls, gradients[::2], gradients[1::2], strict=True):
        call.norm_grad, call.output_grad = y, out
    return [c for c in recorder.calls if c.norm_grad is not None and c.output_grad is not None]


def _loss_value(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its reducer waits for weight gradients, of which there are none
    try:
        with torch.enable_grad():
            value = loss(model, batch)
    except RuntimeError as e:
        if re.search("same device|expected device|different devices", str(e)):
            devices = sorted({str(p.device) for p in model.parameters()})
            raise ValueError(
                f"the batch and the model (on {', '.join(devices)}) are on different devices: "
                f"move the batch first. PyTorch says: {e}"
            ) from e
        raise
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


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training mode inside; modes, buffers, plain attributes and random state as before outside."""
    modules = list(model.modules())
    attributes = [_plain_attributes(module) for module in modules]
    buffers = [
        {name: (b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()}
        for m in modules
    ]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    python_random = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            if not model.training:
                model.train()
            yield
        finally:
            random.setstate(python_random)
            for module, plain, saved in zip(modules, attributes, buffers, strict=True):
                vars(module).update(plain)
                for name, (buffer, value) in saved.items():
                    module._buffers[name] = buffer
                    if buffer is not None and value is not None:
                        buffer.data = value.to(buffer.device)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Running averages and the like that a forward pass may change, as RetinaNet's normalizer."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}
