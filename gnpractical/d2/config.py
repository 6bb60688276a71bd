"""The config keys of this project, and reading a config with errors that help."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from gnpractical.d2.norm import check_norm_names, flatten

_CHOICES = {
    "MODEL.GNP.CHECKPOINT_MISMATCH": ("error", "warn", "ignore"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("absolute", "absolute_range", "relative", "relative_range"),
}
_DEPTHS = (18, 34, 50, 101, 152)
_RESNETS = [f"build_{kind}_backbone" for kind in ("resnet", "resnet_fpn", "retinanet_resnet_fpn")]
_RESNETS += ["build_gnp_resnet_backbone", "build_gnp_resnet_fpn_backbone"]
_LEAST = {
    "MODEL.GNP.CALIBRATION_BATCHES": 1,
    "MODEL.GNP.MATCH_BATCHES": 0,
    "MODEL.GNP.PROBE_PERIOD": 0,
    "MODEL.GNP.STOP_AT": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.EVAL_PERIOD": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "MODEL.PIXEL_STD": 1e-6,
}
# Aliases of YAML that a config needs at most. A few that refer to one another unfold to gigabytes.
_MAX_ALIASES = 50


def add_gnp_config(cfg: CfgNode) -> None:
    """Add this project's keys to ``cfg``. Norms are chosen by the usual NORM keys."""
    # So many batches of SOLVER.IMS_PER_BATCH images make one iteration, a step of the optimizer.
    cfg.SOLVER.ACCUMULATE = 1
    cfg.MODEL.GNP = CfgNode()
    # Paths of modules whose convolutions, where a norm follows, convolve with standardized
    # weights (arXiv 1903.10520): for example ["backbone", "roi_heads.box_head"].
    cfg.MODEL.GNP.WEIGHT_STANDARDIZATION = []
    # When a checkpoint's recorded group counts are not the model's: error, warn or ignore.
    cfg.MODEL.GNP.CHECKPOINT_MISMATCH = "error"
    # When MODEL.WEIGHTS brings the weights of other norms, match the model's to them on so many
    # batches of training images before the first step; 0: do not.
    cfg.MODEL.GNP.MATCH_BATCHES = 0
    # How many batches of training images GN_MEASURED is calibrated on.
    cfg.MODEL.GNP.CALIBRATION_BATCHES = 2
    # Measure the gradient's variance across every block each so many iterations; 0 is never.
    cfg.MODEL.GNP.PROBE_PERIOD = 0
    # Stop after so many iterations of SOLVER.MAX_ITER and evaluate; --resume goes on. 0: do not.
    cfg.MODEL.GNP.STOP_AT = 0
    # Look for annotations that would train wrongly before the first step (COCO formats only).
    cfg.MODEL.GNP.CHECK_ANNOTATIONS = True
    cfg.register_renamed_key("MODEL.GNP.NORM", "MODEL.RESNETS.NORM", "Set MODEL.FPN.NORM, too.")


def load_config(
    config_file: str, opts: Sequence[str] = (), *, allow_unsafe: bool = False
) -> CfgNode:
    """Detectron2's defaults, the MODEL.GNP keys, ``config_file`` and ``opts``, in this order.

    Args:
        config_file: A YAML file; "" for none.
        opts: Alternating keys and values, as on Detectron2's command lines.
        allow_unsafe: Let YAML tags construct Python objects, which can run any code.

    Raises:
        ValueError: In one line, the file or command line, the key, and the nearest valid key.
    """
    cfg = get_cfg()
    add_gnp_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise ValueError(f"Config file {config_file!r} does not exist (in {os.getcwd()})")
        try:
            _check_yaml(config_file)
            cfg.merge_from_file(config_file, allow_unsafe=allow_unsafe)
        except RecursionError as e:
            raise ValueError(f"{config_file}: its _BASE_ leads back to itself") from e
        except Exception as e:  # yacs raises what it comes across
            raise ValueError(f"{config_file}: {_explain(e, cfg)}") from e
    if len(opts) % 2:
        raise ValueError(f"Overrides are pairs of KEY VALUE; got an odd number: {' '.join(opts)}")
    try:
        cfg.merge_from_list(list(opts))
    except Exception as e:
        raise ValueError(f"command line: {_explain(e, cfg)}") from e
    _check(cfg)
    return cfg


def _check_yaml(path: str) -> None:
    with open(path, encoding="utf-8") as f:
        text = f.read()
    aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    if aliases > _MAX_ALIASES:
        raise ValueError(f"it has {aliases} YAML aliases (*name); {_MAX_ALIASES} are admitted")
    _check_keys(yaml.compose(text), set())


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raise ValueError for a key that stands twice in a mapping, of which YAML takes the last."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # aliases share nodes
        return
    seen.add(id(node))
    mapping = isinstance(node, yaml.MappingNode)
    keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if mapping else []
    for i, key in enumerate(keys):
        if key.value in {other.value for other in keys[:i]}:
            line = key.start_mark.line + 1
            raise ValueError(f"line {line}: {key.value!r} stands twice in one mapping")
    for value in [value for _, value in node.value] if mapping else node.value:
        _check_keys(value, seen)


def _check(cfg: CfgNode) -> None:
    check_norm_names(cfg)
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ValueError(
            f"MODEL.DEVICE must be a device of PyTorch's, such as cuda or cpu; "
            f"got {cfg.MODEL.DEVICE!r}"
        ) from None
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise ValueError(
            f"TEST.AUG.ENABLED: Detectron2 has test-time augmentation for GeneralizedRCNN only, "
            f"not for {cfg.MODEL.META_ARCHITECTURE}"
        )
    values = flatten(cfg)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}; got {values[key]!r}")
    for key, least in _LEAST.items():
        numbers = values[key] if isinstance(values[key], list | tuple) else [values[key]]
        if not numbers or not all(number >= least for number in numbers):  # nor nan
            raise ValueError(f"{key} must be at least {least}, got {values[key]}")
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise ValueError(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have a value for each channel; got "
            f"{cfg.MODEL.PIXEL_MEAN} and {cfg.MODEL.PIXEL_STD}"
        )
    # Other projects' ResNets have other depths.
    if cfg.MODEL.BACKBONE.NAME in _RESNETS and cfg.MODEL.RESNETS.DEPTH not in _DEPTHS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH must be one of {', '.join(map(str, _DEPTHS))}; "
            f"got {cfg.MODEL.RESNETS.DEPTH}"
        )


def _explain(error: Exception, cfg: CfgNode) -> str:
    """The error's message in one line, and what helps."""
    if isinstance(error, yaml.constructor.ConstructorError):
        return (
            f"its YAML would construct Python objects ({str(error.problem).strip()}), which can "
            f"run any code. Read it; if you trust it, use --allow-unsafe-config."
        )
    text = error.args[0] if isinstance(error, KeyError) else str(error)  # its str() is a repr
    message = " ".join(str(text).split())
    if message.startswith("Non-existent"):
        key = message.split()[-1]
        near = difflib.get_close_matches(key.upper(), flatten(cfg), n=1, cutoff=0.5)
        return f"{message}; the nearest valid key is {near[0]}" if near else message
    if isinstance(error, AttributeError | TypeError):  # a list or a number for a mapping
        return f"config keys must be in mappings, as MODEL: {{MASK_ON: True}} is ({message})"
    return message
