"""The gradient's variance across every unit block of a real model, measured on real data.

A unit block is weight layer -> norm -> activation. Its K is the variance of dL/dx at the weight
layer's input, of what flows back through this layer alone, over the variance of dL/dx at the
activation's output, or at the norm's where no activation follows directly (before a residual
addition, for example). 1 is isometric; Definition 1 of arXiv 2302.03193.

Nothing about the model changes: parameters, gradients, buffers, modes and the random state are as
before, and hooks are removed, also after an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from gnpractical.layers.activations import ACTIVATION_FUNCTIONS
from gnpractical.layers.pairing import NormPair, find_pairs, layer_widths, norm_width

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class BlockGradient:
    """What was measured of one unit block.

    Attributes:
        name: path of the norm; ``layer`` is the path of the weight layer that feeds it.
        in_channels, out_channels: widths of the weight layer.
        num_groups: G; None for norms without groups.
        activation: the activation that follows the norm directly, such as "relu", or None.
        input_variance, output_variance: of the gradient at the block's two ends, over all
            elements, calls and batches; None where nothing could be measured.
        left_out: calls left out because a gradient was not finite or zero throughout.
        reason: why nothing could be measured, "" where something was.
    """

    name: str
    layer: str
    in_channels: int
    out_channels: int
    num_groups: int | None
    activation: str | None
    input_variance: float | None
    output_variance: float | None
    left_out: int
    reason: str

    @property
    def ratio(self) -> float | None:
        """K, measured."""
        if self.input_variance is None or self.output_variance is None:
            return None
        return self.input_variance / self.output_variance


def measure_gradient_variance(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> list[BlockGradient]:
    """Measure K of every unit block of ``model``, in registration order.

    A block that runs several times (a head shared by feature levels) is measured over all its
    calls. Takes one forward and one backward pass a batch, the latter without weight gradients,
    and holds the gradients of all blocks at once.

    Args:
        model: any model; it runs in training mode.
        batches: what ``loss`` takes, one after the other.
        loss: ``loss(model, batch)`` gives a scalar. By default ``model(batch)``, if that is a
            scalar or a dict of scalar losses, as of Detectron2's models.

    Raises:
        ValueError: no unit block, no batches, batch and model on different devices, or a loss
            that is no finite scalar.
    """
    blocks = {pair.norm: _Block(pair) for pair in _unit_blocks(model)}
    with contextlib.closing(run_batches(model, batches, loss)) as runs:
        for calls in runs:
            for call in calls:
                blocks[call.pair.norm].add(call)
    return [block.result() for block in blocks.values()]


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


class PooledVariance:
    """Biased variance over the elements of several tensors."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        variance, mean = torch.var_mean(values.detach().float(), correction=0)
        self.add_moments(values.numel(), mean.item(), variance.item())

    def add_moments(self, count: int, mean: float, variance: float) -> None:
        self._count += count
        self._sum += count * mean
        self._squares += count * (variance + mean * mean)

    def value(self) -> float | None:
        if not self._count:
            return None
        return self._squares / self._count - (self._sum / self._count) ** 2


def usable(gradient: Tensor) -> bool:
    """Whether ``gradient`` can enter a ratio: finite, and not the same value throughout."""
    return bool(torch.isfinite(gradient).all()) and bool((gradient != gradient.flatten()[:1]).any())


def run_batches(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None
) -> Generator[list[BlockCall], None, None]:
    """For each batch the calls of unit blocks that a gradient reached, their graph still alive.

    Close the generator (``contextlib.closing``): the model is restored when it ends.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its reducer waits for weight gradients, of which there are none
    pairs = _unit_blocks(model)
    none = True
    with _unchanged(model):
        for batch in batches:
            none = False
            with _Recorder(pairs) as recorder:
                value = _run(model, batch, loss or _default_loss)
            calls = recorder.calls
            edges = [edge for call in calls for edge in (call.input, call.output)]
            if edges:
                gradients = torch.autograd.grad(
                    value, edges, retain_graph=True, allow_unused=True
                )
                for call, x, out in zip(calls, gradients[::2], gradients[1::2], strict=True):
                    call.input_grad, call.output_grad = x, out
            yield [c for c in calls if c.input_grad is not None and c.output_grad is not None]
    if none:
        raise ValueError("There are no batches to measure on; at least one is required.")


def _unit_blocks(model: nn.Module) -> list[NormPair]:
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
        if not args or not torch.is_grad_enabled() or not args[0].is_floating_point():
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


@dataclass
class _Block:
    """Sums up the calls of one unit block."""

    pair: NormPair
    activation: str | None = None
    left_out: int = 0
    calls: int = 0
    input: PooledVariance = field(default_factory=PooledVariance)
    output: PooledVariance = field(default_factory=PooledVariance)

    def add(self, call: BlockCall) -> None:
        assert call.input_grad is not None and call.output_grad is not None
        self.activation = call.activation_name
        self.calls += 1
        if usable(call.input_grad) and usable(call.output_grad):
            self.input.add(call.input_grad)
            self.output.add(call.output_grad)
        else:
            self.left_out += 1

    def result(self) -> BlockGradient:
        assert self.pair.layer_name is not None and self.pair.layer is not None
        widths = layer_widths(self.pair.layer)
        assert widths is not None
        reason = ""
        if not self.calls:
            reason = "it did not run, or no gradient reaches it"
        elif self.left_out == self.calls:
            reason = "its gradients are not finite or zero throughout"
        return BlockGradient(
            name=self.pair.norm_name,
            layer=self.pair.layer_name,
            in_channels=widths[0],
            out_channels=norm_width(self.pair.norm) or widths[1],
            num_groups=getattr(self.pair.norm, "num_groups", None),
            activation=self.activation,
            input_variance=self.input.value(),
            output_variance=self.output.value(),
            left_out=self.left_out,
            reason=reason,
        )


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _run(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
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
