"""Matching the norms that a file brought to the other norms of a model, before the first step."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gnpractical.layers.match_norms import MatchedNorm, match_norms, norm_targets
from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.unchanged import Run
from gnpractical.layers.weight_standardization import standardize_layer, unstandardize_layer
from gnpractical.runs.group_record import GroupRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OtherNorms:
    """The GroupNorms of a model whose weights come from a file with other norms.

    Attributes:
        path: The file.
        record: What it says of each of these norms, by path.
        statistics: Mean and variance, where the file's norm is a BatchNorm.
    """

    path: str = ""
    record: GroupRecord = field(default_factory=dict)
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, record: GroupRecord, weights: Mapping[str, Any]) -> OtherNorms:
        """Those of ``record``, with their statistics from the file's ``weights``."""
        statistics = {}
        for name in record:
            both = [weights.get(f"{name}.running_{kind}") for kind in ("mean", "var")]
            if all(value is not None for value in both):
                mean, variance = (torch.as_tensor(value) for value in both)
                statistics[name] = mean, variance
        return cls(path, record, statistics)

    @property
    def tell_their_output(self) -> bool:
        """Whether weight and bias say what the file's norms gave: mean and deviation."""
        return all(
            entry["norm"] in ("BatchNorm2d", "SyncBatchNorm") for entry in self.record.values()
        )

    def targets(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and deviation of each channel behind these BatchNorms, whose weights ``model`` has.

        A channel that hardly varied, beside eps, came out of BatchNorm with less than |weight|.
        """
        targets = {}
        for name, (_, variance) in self.statistics.items():
            norm = model.get_submodule(name)
            assert isinstance(norm, nn.GroupNorm)
            variance = variance.to(norm.weight)
            deviation = norm.weight.detach().abs() * (variance / (variance + norm.eps)).sqrt()
            targets[name] = norm.bias.detach(), deviation
        return targets


def statistics_left(model: nn.Module, weights: Iterable[str]) -> list[str]:
    """The keys of BatchNorm's statistics for what are GroupNorms in ``model``."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return [key for key in weights if key.rpartition(".")[0] in norms and key.endswith(ends)]


def match_loaded(
    model: nn.Module, other_norms: OtherNorms, batches: list[Any], run: Run | None = None
) -> list[MatchedNorm]:
    """Match the norms of ``model`` that are not what they were in the loaded file, and say so.

    Each process runs its own batches, since layers may synchronize; all take rank 0's weights.

    Args:
        model: The model itself, not wrapped for DDP, with the file's weights.
        other_norms: From the checkpointer that loaded it.
        batches, run: As of ``match_norms``.

    Returns:
        A row for each of these norms.
    """
    names = other_norms.record.keys()
    if other_norms.tell_their_output:
        targets = other_norms.targets(model)
    else:
        measured = norm_targets(_original(model, other_norms), batches, run)
        targets = {name: measured[name] for name in names if name in measured}
    rows = match_norms(model, batches, run, targets, only=names)
    norms = {name: model.get_submodule(name) for name in names}
    if dist.is_available() and dist.is_initialized():
        for norm in norms.values():
            for parameter in norm.parameters():
                dist.broadcast(parameter.data, 0)
    for row in rows:
        if not row.skipped_reason:
            norms[row.name].matched_from = other_norms.record[row.name]["norm"]  # type: ignore[assignment]
    matched = [row for row in rows if not row.skipped_reason]
    kinds = Counter(other_norms.record[row.name]["norm"] for row in matched)
    logger.info(
        "Matched %d of %d GroupNorms that begin with the weights of other norms (%s of %s) on %d "
        "batches",
        *(len(matched), len(rows)),
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",
        *(other_norms.path, len(batches)),
    )
    for row in rows:
        if row.skipped_reason:
            logger.warning("%s was not matched: %s", row.name, row.skipped_reason)
    return rows


def _original(model: nn.Module, other_norms: OtherNorms) -> nn.Module:
    """A copy of ``model`` with the norms of the file."""
    original = copy.deepcopy(model)
    for pair in find_pairs(original):
        if pair.norm_name not in other_norms.record:
            continue
        entry = other_norms.record[pair.norm_name]
        for layer in pair.layers.values():
            (standardize_layer if entry["weight_standardized"] else unstandardize_layer)(layer)
        if entry["num_groups"]:
            pair.norm.num_groups = entry["num_groups"]
            continue
        norm = pair.norm
        assert isinstance(norm, nn.GroupNorm)
        frozen = nn.BatchNorm2d(norm.num_channels, norm.eps).to(norm.weight)
        # Where the file has none, they are folded into weight and bias.
        folded = torch.zeros(()), torch.tensor(1 - norm.eps)
        mean, variance = other_norms.statistics.get(pair.norm_name, folded)
        statistics = {"running_mean": mean, "running_var": variance}
        shaped = {k: v.expand(norm.num_channels) for k, v in statistics.items()}
        frozen.load_state_dict(norm.state_dict() | shaped, strict=False)
        path, _, child = pair.norm_name.rpartition(".")
        setattr(original.get_submodule(path), child, frozen)
    return original
