"""Reading Detectron2's LazyConfigs with errors that help."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from gnpractical.d2.config import load_config
from gnpractical.d2.norm import check_norm_name

logger = logging.getLogger(__name__)

_SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train", "gnp")
# Keys that are read, whether or not a config has them.
_OPTIONAL = {
    "gnp": {"accumulate", *map(str.lower, load_config("").MODEL.GNP)},
    "train": {"seed", "cudnn_benchmark", "float32_precision"},  # by Detectron2's default_setup
    "dataloader": {"evaluator"},
}
# What Detectron2's script reads and this trainer does not, with the values that it has here.
_UNREAD = {"train.log_period": 20, "train.checkpointer.max_to_keep": 100}
_UNREAD |= {f"train.ddp.{key}": False for key in ("broadcast_buffers", "fp16_compression")}
_UNREAD |= {"train.ddp.find_unused_parameters": False}


def load_lazy_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The LazyConfig in a Python file, whose code is run, with ``key=value`` overrides.

    Raises:
        ValueError: In one line, the file or the override and what is wrong with it.
    """
    if not os.path.isfile(path):
        raise ValueError(f"Config file {path!r} does not exist (in {os.getcwd()})")
    try:
        lazy = LazyConfig.load(path)
    except Exception as e:  # it is code
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    lazy.setdefault("gnp", {})
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"Overrides are key=value; got {override!r}")
        _check_key(lazy, key)
        try:
            LazyConfig.apply_overrides(lazy, [override])
        except Exception as e:  # the parser's many
            raise ValueError(f"{override}: {e}") from e
    for key in _SECTIONS:
        if not isinstance(lazy.get(key), DictConfig):
            raise ValueError(f"{path}: {key} must be a mapping, got {lazy.get(key)!r}")
    for key in lazy.gnp:
        _check_key(lazy, f"gnp.{key}")
    for key in _keys_of(lazy.model, "model."):
        norm = OmegaConf.select(lazy, key)
        if key.endswith("norm") and isinstance(norm, str) and norm:
            check_norm_name(key, norm)
    for key, value in _UNREAD.items():
        if OmegaConf.select(lazy, key, default=value) != value:
            logger.warning("%s is not read by this trainer, which takes %s", key, value)
    return lazy


def target_of(call: DictConfig) -> Callable[..., Any]:
    """The class or function of a ``LazyCall``."""
    return locate(call._target_) if isinstance(call._target_, str) else call._target_


def _check_key(lazy: DictConfig, key: str) -> None:
    """Raise ValueError unless ``key`` is in ``lazy``, or may be: as an argument of a call."""
    parent_key, dot, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(lazy, parent_key) if dot else lazy
    except Exception:  # its keys have a grammar
        parent = None
    known = set(_OPTIONAL.get(parent_key, ()))
    if isinstance(parent, ListConfig):
        known |= {str(i) for i in range(len(parent))}
    elif isinstance(parent, DictConfig) and parent_key != "gnp":
        known |= {str(k) for k in parent}
        if "_target_" in parent:
            parameters = inspect.signature(target_of(parent)).parameters
            if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                return
            known |= set(parameters)
    if name not in known:
        valid = {f"{parent_key}{dot}{k}" for k in known}.union(_keys_of(lazy)) - {key}
        near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
        hint = f"; the nearest valid key is {near[0]}" if near else ""
        raise ValueError(f"Non-existent config key: {key}{hint}")


def _keys_of(node: Any, prefix: str = "") -> list[str]:
    """The whole keys of all that is in ``node``."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    items = enumerate(node) if isinstance(node, list) else getattr(node, "items", list)()
    keys = []
    for key, value in items:
        keys += [f"{prefix}{key}", *_keys_of(value, f"{prefix}{key}.")]
    return keys
