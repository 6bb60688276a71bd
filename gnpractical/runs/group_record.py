"""What a checkpoint records of every norm, and comparing it with the model that loads it.

A GroupNorm's parameters have the same shape for every number of groups, so that weights trained
with others load without complaint. The record is plain data, by path of the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.weight_standardization import is_weight_standardized
from gnpractical.measure.calibration import measured_norms
from gnpractical.measure.layer_report import group_report

RECORD_KEY = "gnp_groups"

GroupRecord = Mapping[str, Mapping[str, Any]]


class GroupMismatch(ValueError):
    """A checkpoint was trained with other group counts than the model has."""


def group_record(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of each norm.

    ``norm`` is the config string of a GroupNorm and the class of any other norm, whose
    ``num_groups`` is None.
    """
    record: dict[str, dict[str, Any]] = {
        pair.norm_name: {
            "num_groups": None,
            "norm": type(pair.norm).__name__,
            "weight_standardized": is_weight_standardized(pair),
        }
        for pair in find_pairs(model)
    }
    for row in group_report(model):
        record[row.name] |= {"num_groups": row.num_groups, "norm": row.norm}
        if row.matched_from:
            record[row.name]["matched_from"] = row.matched_from
    return record


def record_of_batch_norms(model: nn.Module, weights: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the names of a file's ``weights`` say: which of the model's norms have statistics."""
    keys = set(weights)
    entry = {"num_groups": None, "norm": "BatchNorm2d", "weight_standardized": False}
    names = [pair.norm_name for pair in find_pairs(model)]
    return {name: dict(entry) for name in names if f"{name}.running_mean" in keys}


def check_record(record: GroupRecord) -> None:
    """TypeError or KeyError unless each entry has its fields, of their types."""
    for name, entry in record.items():
        sound = (
            isinstance(name, str)
            and isinstance(entry["num_groups"], int | None)
            and isinstance(entry["norm"], str)
            and isinstance(entry["weight_standardized"], bool)
        )
        if not sound:
            raise TypeError(f"its {RECORD_KEY} has an odd entry: {name!r}: {str(entry)[:80]}")


def take_recorded(model: nn.Module, record: GroupRecord) -> None:
    """Give the model's GN_MEASURED norms the counts the file was calibrated to, and remember what
    its norms were matched from."""
    for name, norm in measured_norms(model).items():
        entry = record.get(name, {})
        if entry.get("norm") == norm.norm_name and entry["num_groups"]:
            try:
                norm.set_num_groups(entry["num_groups"])
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
    differing = differing_norms(model, record)
    for pair in find_pairs(model):
        if "matched_from" in record.get(pair.norm_name, {}) and pair.norm_name not in differing:
            pair.norm.matched_from = record[pair.norm_name]["matched_from"]


def differing_norms(model: nn.Module, record: GroupRecord) -> list[str]:
    """Paths of the norms whose count or weight standardization is not the record's.

    A file may cover a part of the model only, for example a backbone.
    """
    mine = group_record(model)
    return [n for n in mine if n in record and _settings(mine[n]) != _settings(record[n])]


def describe_mismatch(
    path: str, model: nn.Module, record: GroupRecord, differing: list[str]
) -> str:
    """A sentence or two: how many of the norms differ from those in ``path``, and the first."""
    mine = group_record(model)
    first = "; ".join(
        f"{n}: {_describe(record[n])} in the file, {_describe(mine[n])} in the model"
        for n in differing[:3]
    )
    return (
        f"{path} was trained with other group counts: {len(differing)} of {len(mine)} norms "
        f"differ. {first}."
    )


def _settings(entry: Mapping[str, Any]) -> tuple:
    # Two norms without a count may still be a GroupNorm yet to be calibrated and a BatchNorm.
    is_group_norm = entry["norm"].startswith("GN")
    return entry["num_groups"], is_group_norm, entry["weight_standardized"]


def _describe(entry: Mapping[str, Any]) -> str:
    text = f"G={entry['num_groups']}" if entry["num_groups"] else entry["norm"]
    if entry.get("assumed"):
        text += " (assumed, since the file does not say)"
    return f"{text} with weight standardization" if entry["weight_standardized"] else text
