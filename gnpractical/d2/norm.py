"""``GN_PRACTICAL`` and its kin in Detectron2's ``get_norm``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import batch_norm
from torch import nn

from gnpractical.d2.rebind import rebind
from gnpractical.layers.group_norm import group_norm_from_name, unknown_norm_message

# For the message only: which names there are, Detectron2 says.
DETECTRON2_NORM_NAMES = [
    "BN",
    "SyncBN",
    "FrozenBN",
    "GN",
    "LN",
    "nnSyncBN",
    "naiveSyncBN",
    "naiveSyncBN_N",
]


class WatchedName(str):
    """A norm's name that knows whether a norm has been asked for by it."""

    asked = False


def _extended(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_norm(norm, out_channels: int) -> nn.Module | None:
        """Detectron2's ``get_norm``, which knows the norms of gnpractical, too.

        Raises:
            ValueError: The name is unknown; the message lists the valid ones.
        """
        if isinstance(norm, WatchedName):
            norm.asked = True
        if isinstance(norm, str) and norm:
            ours = group_norm_from_name(norm, out_channels)
            if ours is not None:
                return ours
            try:
                return original(norm, out_channels)
            except KeyError:
                raise ValueError(
                    f"{unknown_norm_message(norm, DETECTRON2_NORM_NAMES)} An empty string means "
                    f"no norm. It comes from one of the config's NORM keys, such as "
                    f"MODEL.RESNETS.NORM, MODEL.FPN.NORM or MODEL.SEM_SEG_HEAD.NORM."
                ) from None
        return original(norm, out_channels)

    return get_norm


# The original is kept in __wrapped__: a name of this module that held it would be rebound, too.
get_norm = _extended(batch_norm.get_norm)
rebind(get_norm.__wrapped__, get_norm)  # type: ignore[attr-defined]


def is_group_norm(norm: object) -> bool:
    """Whether a config string names a GroupNorm, Detectron2's or one of ours."""
    return isinstance(norm, str) and (
        norm == "GN" or group_norm_from_name(norm, num_channels=1) is not None
    )


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The values of ``cfg`` by their whole keys, such as ``MODEL.FPN.NORM``."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {}
        values |= nested or {prefix + key: value}
    return values


def norm_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys of ``cfg`` that choose a norm by its name, with these names."""
    return {
        key: value
        for key, value in flatten(cfg).items()
        if key.endswith(".NORM") and isinstance(value, str) and value
    }


def check_norm_names(cfg: CfgNode) -> None:
    """Raise ValueError, naming the config key, if a ``NORM`` of ``cfg`` is unknown."""
    for key, norm in norm_keys(cfg).items():
        check_norm_name(key, norm)


def check_norm_name(key: str, norm: str) -> None:
    """Raise ValueError, naming the config's ``key``, if its value ``norm`` is unknown."""
    try:
        get_norm(norm, 32)
    except ValueError as e:
        raise ValueError(f"{key}: {e}") from None


def group_norm_keys(cfg: CfgNode) -> list[str]:
    """The keys of ``cfg`` that choose a GroupNorm."""
    return [key for key, norm in norm_keys(cfg).items() if is_group_norm(norm)]


def watch_norms(cfg: CfgNode) -> tuple[CfgNode, dict[str, WatchedName]]:
    """A copy of ``cfg`` with names of ours that are watched, in the keys that Detectron2 lacks.

    Heads of other projects often make a GroupNorm where the name is "GN" and no norm where it is
    another, without a word.
    """
    known = flatten(get_cfg())
    watched = {
        key: WatchedName(norm)
        for key, norm in norm_keys(cfg).items()
        if key not in known and group_norm_from_name(norm, num_channels=1) is not None
    }
    if not watched:
        return cfg, {}
    copy = cfg.clone()
    copy.defrost()
    for key, name in watched.items():
        section, _, last = key.rpartition(".")
        functools.reduce(getattr, section.split("."), copy)[last] = name
    if cfg.is_frozen():
        copy.freeze()
    return copy, watched
