"""Running a model and recording its unit blocks: what enters and leaves them, and the gradients.

Nothing about the model changes: parameters, gradients, buffers, modes and the random state are as
before, and hooks are removed, also after an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from gnpractical.layers.activations import ACTIVATION_FUNCTIONS
from gnpractical.layers.pairing import NormPair, find_pairs

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class BlockCall:
    """One call of a unit block in a forward pass, and the gradients at its ends.

    ``norm_input`` (N, C, *) is still part of the graph that leads to the edge ``input``.
    """

    pair: NormPair
    input: GradientEdge
    norm_input: Tensor
    output: GradientEdge
    activation: Callable[[Tensor], Tensor] | None = None
    activation_name: str | None = None
    input_grad: Tensor | None = None
    output_grad: Tensor | None = None


def run_batches(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> Generator[list[BlockCall], None, None]:
    """For each batch the calls of unit blocks that a gradient reached, their graph still alive.

    Close the generator (``contextlib.closing``): the model is restored when it ends.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its reducer waits for weight gradients, of which there are none
    pairs = unit_blocks(model)
    none = True
    with _unchanged(model):
        for batch in batches:
            none = False
            calls = _run(model, batch, loss or _default_loss, pairs)
            yield calls
            calls.clear()  # whoever still holds the list: this graph ends before the next one grows
    if none:
        raise ValueError("There are no batches to measure on; at least one is required.")


def unit_blocks(model: nn.Module) -> list[NormPair]:
    """The norms of ``model`` whose weight layer is known; ValueError if there are none."""
    pairs = [pair for pair in find_pairs(model) if pair.layer is not None]
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no unit block: no norm that follows a conv or linear "
            f"layer was found in it."
        )
    return pairs


class _Recorder(TorchFunctionMode):
    """Notes the calls of unit blocks while it is active.

    Hooks see modules only; the mode also sees activations that are plain functions, as most of
    Detectron2's and torchvision's are.
    """

    def __init__(self, pairs: list[NormPair]) -> None:
        super().__init__()
        self._pairs = pairs
        self._handles: list[Any] = []
        self._inputs: dict[nn.Module, GradientEdge] = {}
        # Norm outputs no activation has followed yet: the tensor, its version, its call.
        self._outputs: dict[int, tuple[Tensor, int, BlockCall]] = {}
        self._open: dict[nn.Module, tuple[NormPair, GradientEdge, Tensor]] = {}
        self.calls: list[BlockCall] = []

    def __enter__(self) -> _Recorder:
        for pair in self._pairs:
            assert pair.layer is not None
            pre, post = pair.norm.register_forward_pre_hook, pair.norm.register_forward_hook
            self._handles += [
                pair.layer.register_forward_pre_hook(self._enter_layer),
                pre(lambda norm, args, pair=pair: self._enter_norm(pair, args)),
                post(lambda norm, args, output: self._leave_norm(norm, output)),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _enter_layer(self, layer: nn.Module, args: tuple) -> tuple | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        if not torch.is_grad_enabled():
            return None
        # An alias of its own, so that only what flows back through this layer is seen.
        x = args[0].view_as(args[0]) if args[0].requires_grad else _leaf(args[0])
        self._inputs[layer] = get_gradient_edge(x)
        return (x, *args[1:])

    def _enter_norm(self, pair: NormPair, args: tuple) -> None:
        assert pair.layer is not None
        edge = self._inputs.pop(pair.layer, None)
        if edge is not None and args and args[0].requires_grad and args[0].numel():
            self._open[pair.norm] = pair, edge, args[0]

    def _leave_norm(self, norm: nn.Module, output: Tensor) -> None:
        entered = self._open.pop(norm, None)
        if entered is not None:
            call = BlockCall(*entered, output=get_gradient_edge(output))
            self._outputs[id(output)] = output, output._version, call
            self.calls.append(call)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # With another version it is another value: a residual was added in place since.
        entry = self._outputs.get(id(args[0])) if args else None
        if entry and (func not in ACTIVATION_FUNCTIONS or entry[0]._version != entry[1]):
            entry = None
        result = func(*args, **kwargs)
        if entry:
            rest, call = args[1:], entry[2]
            call.output = get_gradient_edge(result)
            call.activation = lambda z: func(z, *rest, **kwargs)
            call.activation_name = ACTIVATION_FUNCTIONS[func]
            del self._outputs[id(args[0])]
        return result


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _run(model: nn.Module, batch: Any, loss: Loss, pairs: list[NormPair]) -> list[BlockCall]:
    """The calls of one forward pass that a gradient reached, with the gradients."""
    with _Recorder(pairs) as recorder:
        value = _loss_value(model, batch, loss)
    if not recorder.calls:
        return []
    edges = [edge for call in recorder.calls for edge in (call.input, call.output)]
    gradients = torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True)
    for call, x, out in zip(recorder.calls, gradients[::2], gradients[1::2], strict=True):
        call.input_grad, call.output_grad = x, out
    return [c for c in recorder.calls if c.input_grad is not None and c.output_grad is not None]


def _loss_value(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
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
    if not torch.isfinite(value):
        raise ValueError(f"the loss is {value.item()}: there are no gradients to measure")
    return value


def _default_loss(model: nn.Module, batch: Any) -> Any:
    output = model(batch)
    return sum(output.values()) if isinstance(output, dict) else output


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training mode inside; modes, buffers and the random state as they were outside."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        try:
            if not model.training:
                model.train()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
