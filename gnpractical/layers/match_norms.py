"""Carrying a trained model over to other norms, without labels and without training.

BatchNorm's weight and bias say what its output was: in each channel the mean is the bias and the
deviation |weight|. With the same weight and bias GroupNorm gives something else, since it divides
by the deviation of groups. Here weight and bias are set so that each channel of the output has
that mean and deviation again, on a few batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.layers.channel_moments import ChannelStatistics
from gnpractical.layers.group_norm import PracticalGroupNorm
from gnpractical.layers.pairing import check_model, norm_width
from gnpractical.layers.unchanged import Run, run_forward

Hook = Callable[..., Tensor | None]

# Normalized features deviate by about 1. Channels that deviate by less than this say nothing.
_LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class MatchedNorm:
    """What matching did to one GroupNorm.

    Attributes:
        name: Its path.
        num_channels: C.
        weight_factor: By how much its weight grew, as the geometric mean over the channels.
        bias_shift: By how much its bias changed, as the root mean square over the channels.
        skipped_reason: Why it is as it was, "" where it was matched.
    """

    name: str
    num_channels: int
    weight_factor: float = 1.0
    bias_shift: float = 0.0
    skipped_reason: str = ""


def match_norms(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run | None = None,
    targets: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    only: Collection[str] | None = None,
) -> list[MatchedNorm]:
    """Give the output of every GroupNorm, in place, the mean and deviation it is meant to have.

    One forward pass a batch, in evaluation mode and without gradients. Each norm is matched when
    it runs, so that later ones already see what it gives from then on; further batches and calls
    refine the averages. Norms whose parameters do not train are matched, too, since training will
    not mend them.

    Args:
        model: A model with GroupNorms whose weights and biases come from other norms, by
            ``convert`` or from a file.
        batches: Some batches of inputs; together a few dozen images are enough.
        run: ``run(model, batch)`` runs the model. By default ``model(batch)``.
        targets: For the paths of norms the mean (C,) and deviation (C,) of each channel, from
            :func:`norm_targets`. By default, and for other norms, the bias and |weight|.
        only: The paths of the norms to match. By default all.

    Returns:
        A row for every GroupNorm of these, in registration order.

    Raises:
        TypeError: ``batches`` are not a list of batches, ``only`` not one of paths, or a target is
            no pair of tensors.
        ValueError: There is no GroupNorm or no batch; ``only`` or ``targets`` name something else
            than GroupNorms; a target is not of its norm's width; or something is not finite.
        RuntimeError: A norm has no number of groups yet. After any error the model is as it was.
    """
    check_model(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no GroupNorm to match")
    if isinstance(only, str) or not isinstance(targets, Mapping | None):
        raise TypeError("only must be a list of paths, and targets a dict by path")
    known = {name for name, module in model.named_modules() if norm_width(module) is not None}
    for what, names in (("only", only or ()), ("targets", targets or ())):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"{what} must name norms of the model, such as {next(iter(norms))!r}; it names "
                f"{len(unknown)} that are none, first {unknown[0]!r}"
            )
    norms = {n: m for n, m in norms.items() if only is None or n in only}
    matchers = {name: _Matcher(name, norm, targets or {}) for name, norm in norms.items()}
    hooks: dict[nn.Module, Hook] = {norms[n]: matcher.match for n, matcher in matchers.items()}
    try:
        for matcher in matchers.values():
            matcher.begin()
        _run_with(model, batches, run, hooks)
    except BaseException:
        for matcher in matchers.values():
            matcher.undo()
        raise
    return [matcher.finish() for matcher in matchers.values()]


def norm_targets(
    original: nn.Module, batches: Iterable[Any], run: Run | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean and deviation of each channel behind every norm of a trained model.

    For originals whose weights and biases do not say it: frozen BatchNorm with folded statistics,
    or GroupNorm. The arguments and errors are those of :func:`match_norms`.
    """
    check_model(original)
    # Some of timm's hold an activation, too, behind which this would measure.
    norms = {
        name: module
        for name, module in original.named_modules()
        if norm_width(module) is not None and not list(module.children())
    }
    if not norms:
        raise ValueError(f"{type(original).__name__} has no norm to measure")
    seen = {name: ChannelStatistics() for name in norms}
    hooks = {norms[n]: lambda _, args, output, of=of: of.add(output) for n, of in seen.items()}
    _run_with(original, batches, run, hooks)
    return {name: (of.mean, of.deviation) for name, of in seen.items() if of.count}


def _run_with(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run | None,
    hooks: Mapping[nn.Module, Hook],
) -> None:
    with contextlib.ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        run_forward(model, batches, run, training=False)


class _Matcher:
    """Matches one norm each time it runs."""

    def __init__(
        self, name: str, norm: nn.GroupNorm, targets: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        self._name, self._norm = name, norm
        self._seen = ChannelStatistics()
        # Others, such as timm's, may apply an activation, too.
        self._plain = type(norm) in (nn.GroupNorm, PracticalGroupNorm)
        self._affine = norm.weight is not None and norm.bias is not None
        if self._affine:
            self._before = norm.weight.detach().clone(), norm.bias.detach().clone()
            weight, bias = (t.double() for t in self._before)
            target = targets.get(name, (bias, weight.abs()))
            if len(target) != 2 or not all(isinstance(value, Tensor) for value in target):
                raise TypeError(f"{name}: targets must be a mean and a deviation, two tensors (C,)")
            mean, deviation = target
            if mean.shape != bias.shape or deviation.shape != bias.shape:
                raise ValueError(
                    f"{name}: targets must have its {norm.num_channels} channels, got "
                    f"{tuple(mean.shape)} and {tuple(deviation.shape)}"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
                raise ValueError(f"{name}: its targets, or its weight and bias, are not finite")
            # The sign is the weight's, which a deviation does not have.
            self._mean = mean.to(bias)
            self._scale = torch.where(weight < 0, -deviation.to(bias), deviation.to(bias))

    def begin(self) -> None:
        """Let the norm give what it normalizes, so that it need not be computed twice."""
        if self._affine and self._plain:
            self._set(*(torch.full_like(t, v) for t, v in zip(self._before, (1, 0), strict=True)))

    def match(self, norm: nn.GroupNorm, args: tuple, output: Tensor) -> Tensor:
        if not self._affine or not self._plain or not output.numel():
            return output
        self._seen.add(output)
        if not torch.isfinite(self._seen.deviation).all():
            raise ValueError(f"{self._name}: what it gets from these batches is not finite")
        weight, bias = self._matched()
        shape = (1, -1) + (1,) * (output.dim() - 2)
        return output.mul_(weight.view(shape).to(output)).add_(bias.view(shape).to(output))

    def finish(self) -> MatchedNorm:
        """Set what was found, or what was before if nothing was."""
        reason, channels = "", self._norm.num_channels
        if not self._plain:
            kind = f"{type(self._norm).__module__}.{type(self._norm).__name__}"
            reason = f"its class, {kind}, may do more than normalize: convert it first"
        elif not self._affine:
            reason = "it has no weight and bias"
        elif not self._seen.count:
            reason = "it did not run"
        elif not self._varies().any():
            reason = "its channels are constant"
        if reason:
            self.undo()
            return MatchedNorm(self._name, channels, skipped_reason=reason)
        weight, bias = self._matched()
        self._set(weight, bias)
        before = self._before[0].double().abs()
        grown = (weight.abs() / before)[before > 0]
        factor = grown.clamp(min=1e-12).log().mean().exp().item() if len(grown) else 1.0
        shift = (bias - self._before[1]).square().mean().sqrt().item()
        return MatchedNorm(self._name, channels, factor, shift)

    def undo(self) -> None:
        if self._affine:
            self._set(*self._before)

    def _varies(self) -> Tensor:
        return self._seen.deviation > _LEAST_DEVIATION

    def _matched(self) -> tuple[Tensor, Tensor]:
        weight = self._scale / torch.where(self._varies(), self._seen.deviation, 1.0)
        return weight, self._mean - weight * self._seen.mean

    def _set(self, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            self._norm.weight.copy_(weight)
            self._norm.bias.copy_(bias)
