"""Detectron2's LazyConfigs, trained by the trainer of YAML configs.

What the trainer itself reads is translated to the keys of a YAML config. Model, data, optimizer and
schedule are instantiated as the LazyConfig says.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.solver import LRMultiplier
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from gnpractical.d2.config import load_config
from gnpractical.d2.lazy_config import target_of
from gnpractical.d2.mapper import CheckedMapper
from gnpractical.d2.standardized_model import standardize_weights
from gnpractical.d2.trainer import Trainer
from gnpractical.layers.pairing import require_resolved

# A LazyConfig's key of each key of a YAML config that the trainer reads.
_READ = {f"MODEL.GNP.{key}": f"gnp.{key.lower()}" for key in load_config("").MODEL.GNP} | {
    "OUTPUT_DIR": "train.output_dir",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.ACCUMULATE": "gnp.accumulate",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.sem_seg_head.num_classes",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "model.sem_seg_head.ignore_value",
}
# And of those that only its messages name. Shells write out what is in braces.
_NAMED = {
    "INPUT.FORMAT": "{model.input_format,dataloader.train.mapper.image_format}",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.RESNETS.NORM": "model.backbone.bottom_up.{stem,stages}.norm",
    "MODEL.RESNETS.DEPTH": "model.backbone.bottom_up.stages.depth",
    "MODEL.RESNETS.NUM_GROUPS": "model.backbone.bottom_up.stages.num_groups",
    "MODEL.RESNETS.STRIDE_IN_1X1": "model.backbone.bottom_up.stages.stride_in_1x1",
    "MODEL.FPN.NORM": "model.backbone.norm",
    "MODEL.SEM_SEG_HEAD.NORM": "model.sem_seg_head.norm",
    "MODEL.ROI_BOX_HEAD.NORM": "model.roi_heads.box_head.conv_norm",
    "MODEL.ROI_MASK_HEAD.NORM": "model.roi_heads.mask_head.conv_norm",
}


def yaml_config(lazy: DictConfig) -> CfgNode:
    """A YAML config with what the trainer reads of ``lazy``.

    Raises:
        ValueError: A value is of another type than that of YAML configs, or out of range.
    """
    options: list[Any] = ["MODEL.META_ARCHITECTURE", target_of(lazy.model).__name__]
    for key, lazy_key in _READ.items():
        value = OmegaConf.select(lazy, lazy_key)
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value)
        if key.startswith("DATASETS."):
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if value is not None:
            options += [key, value]
    try:
        return load_config("", options)
    except ValueError as e:
        raise ValueError(str(e).removeprefix("command line: ")) from e


@contextlib.contextmanager
def lazy_words() -> Iterator[None]:
    """Let errors name a LazyConfig's keys in place of a YAML config's, as ``key=value``."""
    keys = _READ | _NAMED
    key = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))  # the longest first
    value = r"[\d\[]|True|False|warn\b|[A-Za-z]*N_|[A-Za-z]*BN\b"
    pattern = rf"(?<![\w.])({key})(?!\.?\w)( (?={value}))?"
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as e:
        text = re.sub(pattern, lambda m: keys[m[1]] + ("=" if m[2] else ""), str(e))
        raise ValueError(text) from e


def lazy_trainer(lazy: DictConfig) -> type[Trainer]:
    """The class whose objects train ``lazy``, by the config that :func:`yaml_config` makes of it.

    It evaluates by ``dataloader.evaluator``, or where that is missing or None, as with YAML
    configs, by the data set's kind.
    """

    class LazyTrainer(Trainer):
        finite_advice = "Try a lower optimizer.lr or a longer lr_multiplier.warmup_length."

        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            model = instantiate(lazy.model).to(cfg.MODEL.DEVICE)
            standardize_weights(model, cfg)
            require_resolved(model)
            return model

        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Any:
            lazy.optimizer.params.model = model
            return instantiate(lazy.optimizer)

        @classmethod
        def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Any) -> LRMultiplier:
            return LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            workers = cfg.DATALOADER.NUM_WORKERS  # which batches for calibration set to 0
            return _loader(lazy.dataloader.train, cfg, is_train=True, num_workers=workers)

        @classmethod
        def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
            lazy.dataloader.test.dataset.names = dataset_name  # of several, one at a time
            return _loader(lazy.dataloader.test, cfg, is_train=False)

        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
            evaluator = lazy.dataloader.get("evaluator")
            if evaluator is None:
                return super().build_evaluator(cfg, dataset_name)
            return instantiate(evaluator)

    return LazyTrainer


def _loader(call: DictConfig, cfg: CfgNode, *, is_train: bool, **more: Any) -> Any:
    arguments = {key: instantiate(value) for key, value in call.items() if key != "_target_"}
    mapper = CheckedMapper(cfg, is_train=is_train, mapper=arguments.pop("mapper"))
    return target_of(call)(**arguments | {"mapper": mapper} | more)
