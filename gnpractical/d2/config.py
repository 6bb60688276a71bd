"""The ``MODEL.GNP`` config keys, and reading a config with errors that help."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from gnpractical.d2.norm import check_norm_names

MISMATCH_CHOICES = ("error", "warn", "ignore")


def add_gnp_config(cfg: CfgNode) -> None:
    """Add the ``MODEL.GNP`` keys to ``cfg``."""
    cfg.MODEL.GNP = CfgNode()
    # Norm of the backbones build_gnp_resnet_backbone and build_gnp_resnet_fpn_backbone:
    # GN_PRACTICAL (Algorithm 1 of arXiv 2302.03193), GN_CLOSEST (its Definition 3), GN_EXACT (the
    # exact law for linear layers), GN_MEASURED (by measuring, before the first step) or GN_<k>.
    # Everywhere else, and with Detectron2's own backbones, norms are chosen by the usual NORM keys.
    cfg.MODEL.GNP.NORM = "GN_PRACTICAL"
    # Paths of modules whose convolutions, where a norm follows, convolve with standardized
    # weights (arXiv 1903.10520): for example ["backbone", "roi_heads.box_head"].
    cfg.MODEL.GNP.WEIGHT_STANDARDIZATION = []
    # When a checkpoint's recorded group counts are not the model's: error, warn or ignore.
    cfg.MODEL.GNP.CHECKPOINT_MISMATCH = "error"
    # How many of the first batches GN_MEASURED is calibrated on.
    cfg.MODEL.GNP.CALIBRATION_BATCHES = 2
    # Measure the gradient's variance across every block each so many iterations; 0 is never.
    cfg.MODEL.GNP.PROBE_PERIOD = 0
    # Look for annotations that would train wrongly before the first step (COCO formats only).
    cfg.MODEL.GNP.CHECK_ANNOTATIONS = True


def load_config(
    config_file: str, opts: Sequence[str] = (), *, allow_unsafe: bool = False
) -> CfgNode:
    """Detectron2's defaults, the MODEL.GNP keys, ``config_file`` and ``opts``, in this order.

    Args:
        config_file: a YAML file; "" for none.
        opts: alternating keys and values, as on Detectron2's command lines.
        allow_unsafe: let YAML tags construct Python objects, which can run any code.

    Raises:
        ValueError: in one line, the file or command line, the key, and the nearest valid key.
    """
    cfg = get_cfg()
    add_gnp_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise ValueError(f"Config file {config_file!r} does not exist (in {os.getcwd()})")
        try:
            cfg.merge_from_file(config_file, allow_unsafe=allow_unsafe)
        except yaml.constructor.ConstructorError as e:
            if allow_unsafe:
                raise ValueError(_explain(e, config_file, cfg)) from e
            raise ValueError(
                f"{config_file}: its YAML would construct Python objects "
                f"({str(e.problem).strip()}), which can run any code. Read it; if you trust it, "
                f"use --allow-unsafe-config."
            ) from e
        except OSError as e:  # a _BASE_ that does not exist
            raise ValueError(f"{config_file}: a file could not be read: {e}") from e
        except RecursionError as e:
            raise ValueError(f"{config_file}: its _BASE_ leads back to itself") from e
        except AttributeError as e:
            raise ValueError(f"{config_file}: expected a mapping of config keys") from e
        except (yaml.YAMLError, AssertionError, KeyError, ValueError, TypeError) as e:
            raise ValueError(_explain(e, config_file, cfg)) from e
    if len(opts) % 2:
        raise ValueError(f"Overrides are pairs of KEY VALUE; got an odd number: {' '.join(opts)}")
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError, TypeError) as e:
        raise ValueError(_explain(e, "command line", cfg)) from e
    check_norm_names(cfg)
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ValueError(
            f"MODEL.DEVICE must be a device of PyTorch's, such as cuda or cpu; "
            f"got {cfg.MODEL.DEVICE!r}"
        ) from None
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED: test-time augmentation is not available here")
    if cfg.MODEL.GNP.CHECKPOINT_MISMATCH not in MISMATCH_CHOICES:
        raise ValueError(
            f"MODEL.GNP.CHECKPOINT_MISMATCH must be one of {', '.join(MISMATCH_CHOICES)}; "
            f"got {cfg.MODEL.GNP.CHECKPOINT_MISMATCH!r}"
        )
    if cfg.MODEL.GNP.CALIBRATION_BATCHES < 1 or cfg.MODEL.GNP.PROBE_PERIOD < 0:
        raise ValueError(
            f"MODEL.GNP.CALIBRATION_BATCHES must be at least 1 and PROBE_PERIOD at least 0; got "
            f"{cfg.MODEL.GNP.CALIBRATION_BATCHES} and {cfg.MODEL.GNP.PROBE_PERIOD}"
        )
    return cfg


def _explain(error: Exception, source: str, cfg: CfgNode) -> str:
    # str() of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    message = " ".join(str(text).split())
    unknown = re.search(r"[Nn]on-existent (?:config )?key:? ?([\w.]+)", message)
    if unknown:
        message = f"unknown config key {unknown[1]}"
        keys = {key.upper(): key for key in _keys(cfg)}
        near = difflib.get_close_matches(unknown[1].upper(), keys, n=1, cutoff=0.5)
        if near:
            message += f"; the nearest valid key is {keys[near[0]]}"
    elif "is not iterable" in message:
        message = "a section of the config, such as MODEL, holds no keys"
    return f"{source}: {message}"


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
