"""What passes forward through every unit block, and what the law says of its gradient from that.

One number decides: mean_share, the share of a feature map's energy that lies in the means of its
channels, in each sample (rho in docs/THEORY.md). What is not in them is what tells positions and
images apart. No loss and no backward pass is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnpractical.activation_gain import activation_gain
from gnpractical.gradient_law import norm_factor
from gnpractical.layers.channel_moments import channel_moments
from gnpractical.layers.data_flow import Source
from gnpractical.layers.pairing import check_model, layer_widths
from gnpractical.layers.unchanged import Run, run_forward
from gnpractical.layers.weight_standardization import Standardized, standardize_weight
from gnpractical.measure.unit_blocks import Activation, BlockFlow
from gnpractical.num_groups import check_num_groups

# So many images, or regions of a detector's heads, of a batch are compared with one another.
_COMPARED = 64


@dataclass(frozen=True)
class BlockFeatures:
    """What was seen of one unit block, over all its calls.

    Attributes:
        name: Path of the norm, a GroupNorm.
        layer: Path of the weight layer that feeds it, of several if there were; "" if none.
        out_channels, num_groups: C and G of the norm.
        activation: The activation that follows the norm directly, such as "relu", or None.
        mean_share: The share of energy in the channels' means in front of the norm.
        mean_share_behind: The same behind the norm.
        similarity: The mean cosine between the features of two images of a batch, behind the norm,
            among the first 64; None where no batch had two.
        effective_rank: How many images' features are different: the exponential of the entropy
            of the spectrum of their cosines, from 1 to the number of images. None as above.
        positions: H W in the mean over samples.
        fewest_positions: H W of the smallest call.
        scale: K but for the norm's factor; None where the layer's weights are not known.
        skipped_reason: Why nothing was seen, "" where something was.
    """

    name: str
    layer: str
    out_channels: int
    num_groups: int | None
    activation: str | None = None
    mean_share: float | None = None
    mean_share_behind: float | None = None
    similarity: float | None = None
    effective_rank: float | None = None
    positions: int | None = None
    fewest_positions: int | None = None
    scale: float | None = None
    skipped_reason: str = ""

    def gradient_variance_ratio(self, num_groups: int | None = None) -> float | None:
        """K by the exact law, were the norm's count ``num_groups``; by default as it is.

        Raises:
            ValueError: ``num_groups`` does not divide the norm's channels.
        """
        num_groups = self.num_groups if num_groups is None else num_groups
        if self.scale is None or self.mean_share is None or num_groups is None:
            return None
        check_num_groups(num_groups, self.out_channels)
        assert self.positions is not None
        per_group = self.out_channels // num_groups
        return self.scale * norm_factor(per_group, self.mean_share, self.positions)


def feature_statistics(
    model: nn.Module, batches: Iterable[Any], run: Run | None = None
) -> list[BlockFeatures]:
    """Look at every GroupNorm of ``model``, in registration order, in forward passes alone.

    Args:
        model: Any model; it runs in training mode and without gradients.
        batches: What ``run`` takes, one after the other.
        run: ``run(model, batch)`` runs the model. By default ``model(batch)``.

    Raises:
        TypeError: ``batches`` or ``run`` is of the wrong kind.
        ValueError: There is no GroupNorm, or no batch, or a norm gets values that are not finite.
        RuntimeError: A norm has no number of groups yet.
    """
    check_model(model)
    blocks: dict[nn.Module, _Block] = {
        module: _Block(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no GroupNorm to look at")
    with _Recorder(model, blocks):
        run_forward(model, batches, run, training=True)
    return [block.result() for block in blocks.values()]


class _Recorder(BlockFlow):
    """Hands what the norms get and give to their blocks."""

    def __init__(self, model: nn.Module, blocks: Mapping[nn.Module, _Block]) -> None:
        super().__init__(model)
        self._blocks = blocks
        self._layers = dict(model.named_modules())
        self._sizes: dict[nn.Module, torch.Size] = {}  # of the last input of each layer

    def at_layer(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, None]:
        self._sizes[layer] = x.shape[2:]
        return x, None

    def at_norm(self, norm: nn.Module, y: Tensor, source: Source | None) -> Tensor:
        if norm in self._blocks and y.numel():
            names = source.layers if source else ()
            layers = [self._layers.get(name) for name in names]
            gain = _backward_gain([(m, self._sizes[m]) for m in layers if m in self._sizes])
            known = layers and all(m in self._sizes for m in layers)
            self._blocks[norm].enter(y, ", ".join(names), gain if known else None)
        return y

    def left_norm(self, norm: nn.Module, output: Tensor) -> _Block | None:
        block = self._blocks.get(norm)
        if block is not None and output.numel():
            block.leave(output)
        return block


class _Block:
    """Sums up the calls of one norm, which count by their numbers of values."""

    def __init__(self, name: str, norm: nn.GroupNorm) -> None:
        self.activation: Activation | None = None
        self._name, self._norm = name, norm
        self._layer = ""
        self._values = self._samples = 0
        self._fewest_positions = 0
        self._energy, self._of_means = [0.0, 0.0], [0.0, 0.0]  # in front of the norm and behind
        self._scale: float | None = 0.0
        self._similarities: list[tuple[float, float]] = []

    def enter(self, y: Tensor, layer: str, gain: float | None) -> None:
        if self._norm.num_groups is None:
            self._norm.forward(y)  # which resolves it, or says why it cannot
        self.activation, self._layer = None, layer
        moments = channel_moments(y)
        if not all(torch.isfinite(t).all() for t in moments):
            raise ValueError(f"{self._name}: what it gets from these batches is not finite")
        positions = y[0, 0].numel()
        self._fewest_positions = min(self._fewest_positions or positions, positions)
        self._samples += len(y)
        self._values += y.numel()
        for i, (means, variances) in enumerate((moments, self._normalized(*moments))):
            self._energy[i] += positions * (means**2 + variances).sum().item()
            self._of_means[i] += positions * (means**2).sum().item()
        if gain is None or self._scale is None:
            self._scale = None
        else:  # each sample's gradient is divided by its own energy
            energies = (moments[0] ** 2 + moments[1]).mean(1) + self._norm.eps
            self._scale += y.numel() * gain * (1 / energies).mean().item()

    def _normalized(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of what the norm makes of an input with these."""
        norm = self._norm
        m, v = (t.unflatten(1, (norm.num_groups, -1)) for t in (means, variances))
        variance = v.mean(2, keepdim=True) + m.var(2, correction=0, keepdim=True) + norm.eps
        m = ((m - m.mean(2, keepdim=True)) / variance.sqrt()).flatten(1)
        v = (v / variance).flatten(1)
        if norm.weight is not None:
            m, v = m * norm.weight, v * norm.weight**2
        return m if norm.bias is None else m + norm.bias, v

    def leave(self, z: Tensor) -> None:
        z = z[:_COMPARED]
        if len(z) < 2:
            return
        features = z.flatten(1).float()
        products = (features @ features.T).double()
        lengths = products.diagonal().clamp(min=1e-12).sqrt()
        cosines = products / (lengths * lengths[:, None])
        mean = (cosines.sum() - cosines.trace()) / (len(z) * (len(z) - 1))
        spectrum = torch.linalg.eigvalsh(cosines).clamp(min=1e-12) / len(z)
        rank = (-spectrum * spectrum.log()).sum().exp()
        self._similarities.append((mean.item(), rank.item()))

    def result(self) -> BlockFeatures:
        norm = self._norm
        row = BlockFeatures(self._name, self._layer, norm.num_channels, norm.num_groups)
        if not self._values:
            return replace(row, skipped_reason="it did not run")
        if not self._energy[0]:
            return replace(row, skipped_reason="what it gets is zero throughout")
        activation = self.activation.name if self.activation else None
        scale = None
        if self._scale is not None:
            weight = 1.0 if norm.weight is None else norm.weight.square().mean().item()
            backward = _gain_of(activation).backward if activation else 1.0
            scale = self._scale / self._values * weight * backward
        share, behind = (
            m / e if e else 0.0 for m, e in zip(self._of_means, self._energy, strict=True)
        )
        positions = round(self._values / (self._samples * norm.num_channels))
        similarity = rank = None
        if self._similarities:
            similarity, rank = map(fmean, zip(*self._similarities, strict=True))
        return replace(
            row,
            activation=activation,
            mean_share=min(share, 1.0) if positions > 1 else 1.0,
            mean_share_behind=min(behind, 1.0),
            similarity=similarity,
            effective_rank=rank,
            positions=positions,
            fewest_positions=self._fewest_positions,
            scale=scale,
        )


def _backward_gain(layers: list[tuple[nn.Module, torch.Size]]) -> float | None:
    """By what weight layers, side by side, multiply the variance of white gradients.

    Args:
        layers: Each with the size of its input.
    """
    total = width = 0.0
    for layer, size in layers:
        weight = getattr(layer, "weight", None)
        widths = layer_widths(layer)
        if not isinstance(weight, Tensor) or widths is None:
            return None
        if isinstance(layer, Standardized):
            weight = standardize_weight(weight)
        # A position of the input is read by some of the taps only, at strides and borders.
        read = 1.0
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            read = _taps_read(layer, size)
        total += torch.linalg.vector_norm(weight.detach()).item() ** 2 * read
        width += widths[0]
    return total / width if width else None


_gain_of = cache(activation_gain)  # which integrates anew each time


def _taps_read(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: torch.Size) -> float:
    """The share of a filter's taps that read a position, in the mean over the input's positions."""
    if layer.padding_mode != "zeros":  # there are no borders
        return 1 / math.prod(layer.stride)
    ones = torch.ones(1, 1, *size)
    taps = torch.ones(1, 1, *layer.kernel_size)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    reads = convolve(ones, taps, None, layer.stride, layer.padding, layer.dilation).sum().item()
    return reads / (ones.numel() * taps.numel())
