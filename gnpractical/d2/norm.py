"""``GN_PRACTICAL`` and its kin in Detectron2's ``get_norm``."""

from __future__ import annotations

import types

from detectron2.config import CfgNode
from detectron2.layers import batch_norm
from torch import nn

from gnpractical.layers.group_norm import group_norm_from_name, unknown_norm_message

DETECTRON2_NORM_NAMES = [
    "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"
]  # fmt: skip


def extend(function: types.FunctionType, replacement: types.FunctionType) -> types.FunctionType:
    """Make ``function`` run ``replacement``'s code, for everyone who already holds it.

    ``get_norm`` is imported by name into a dozen of Detectron2's modules and into users' own, so
    rebinding one name reaches too few callers, and modules imported later are missed by a sweep.
    The function object is the one thing all of them share. ``replacement`` must not close over
    anything and must import what it needs, since it runs with ``function``'s globals.

    Returns:
        The original behaviour as a separate function. Extending twice changes nothing.
    """
    if not hasattr(function, "_gnp_original"):
        original = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
        function._gnp_original = original  # type: ignore[attr-defined]
        function.__code__ = replacement.__code__
    return function._gnp_original  # type: ignore[attr-defined]


def build_norm(norm, out_channels: int) -> nn.Module | None:
    """What ``get_norm(norm, out_channels)`` returns once ``gnpractical.d2`` is imported.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    if isinstance(norm, str) and norm:
        ours = group_norm_from_name(norm, out_channels)
        if ours is not None:
            return ours
        if norm not in DETECTRON2_NORM_NAMES:
            raise ValueError(
                f"{unknown_norm_message(norm, DETECTRON2_NORM_NAMES)} '' is none. It comes from "
                f"one of the config's NORM keys, such as MODEL.RESNETS.NORM, MODEL.FPN.NORM or "
                f"MODEL.SEM_SEG_HEAD.NORM."
            )
    return _detectron2_get_norm(norm, out_channels)


def check_norm_names(cfg: CfgNode, prefix: str = "") -> None:
    """Raise ValueError, naming the config key, if a ``NORM`` of ``cfg`` is unknown."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            check_norm_names(value, f"{prefix}{key}.")
        elif key == "NORM" and isinstance(value, str) and value:
            if value not in DETECTRON2_NORM_NAMES and group_norm_from_name(value, 1) is None:
                message = unknown_norm_message(value, DETECTRON2_NORM_NAMES)
                raise ValueError(f"{prefix}{key}: {message} '' is none.")


def group_norm_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """The keys of ``cfg`` that choose a GroupNorm, Detectron2's or one of ours."""
    keys = []
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            keys += group_norm_keys(value, f"{prefix}{key}.")
        elif key == "NORM" and isinstance(value, str):
            if value == "GN" or group_norm_from_name(value, 1) is not None:
                keys.append(prefix + key)
    return keys


def _get_norm(norm, out_channels):
    from gnpractical.d2.norm import build_norm

    return build_norm(norm, out_channels)


_detectron2_get_norm = extend(batch_norm.get_norm, _get_norm)
