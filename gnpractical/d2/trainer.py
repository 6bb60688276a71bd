"""Detectron2's DefaultTrainer with the group report, checked checkpoints, and CPU processes."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import TrainerBase
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch import nn

from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.evaluation import build_evaluator
from gnpractical.d2.mapper import CheckedMapper
from gnpractical.d2.preflight import check_datasets
from gnpractical.d2.probe import GradientProbe
from gnpractical.layers.pairing import require_resolved
from gnpractical.measure.calibration import measured_norms
from gnpractical.runs.accumulation import Accumulated, Grouped
from gnpractical.runs.calibrate_measured import calibrate_measured
from gnpractical.runs.carry_over import match_loaded
from gnpractical.runs.errors import without_traceback
from gnpractical.runs.output_dir import check_disk_space, write_group_report

logger = logging.getLogger(__name__)

# The score of each task that is logged at the end of an evaluation.
HEADLINES = {"bbox": "AP", "segm": "AP", "sem_seg": "mIoU", "panoptic_seg": "PQ"}


class Trainer(DefaultTrainer):
    """As ``DefaultTrainer``, but

    * before the first step calibrates GN_MEASURED norms, matches norms that begin with the weights
      of other norms, and logs the group report, which it writes to ``OUTPUT_DIR/groups.json``;
    * takes ``SOLVER.ACCUMULATE`` batches for a step;
    * measures the gradient's variance each ``MODEL.GNP.PROBE_PERIOD`` iterations;
    * checks data sets, annotations and disk space before the first step;
    * saves and loads with :class:`GNPCheckpointer`;
    * evaluates with the evaluators of ``evaluation.build_evaluator``;
    * runs in several processes on CPU (gloo) as on GPUs (NCCL);
    * when the loss is no longer finite, names the last good checkpoint.

    Raises:
        ValueError: Norms have no group count, or data sets are missing or wrong.
        OSError: There is too little disk space.
    """

    # What a user can do about a loss that is no longer finite.
    finite_advice = (
        "Try a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED "
        "True."
    )

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own __init__ cannot be extended: it wraps the model for GPUs only and
        # names its checkpointer. The order of the objects is the one it prescribes, and _trainer
        # is where its other methods expect the inner trainer.
        TrainerBase.__init__(self)
        _log_to(cfg.OUTPUT_DIR)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if comm.is_main_process():
            check_datasets(cfg, "TRAIN", "TEST")
        comm.synchronize()
        model = self.build_model(cfg)
        if comm.is_main_process():
            count = cfg.SOLVER.MAX_ITER // max(cfg.SOLVER.CHECKPOINT_PERIOD, 1) + 1
            check_disk_space(cfg.OUTPUT_DIR, model, count, "OUTPUT_DIR")
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None
        )
        self._trainer = _inner_trainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        match = cfg.MODEL.GNP.MATCH_BATCHES > 0
        self.checkpointer = GNPCheckpointer.from_config(
            cfg, model, cfg.DATASETS.TRAIN[0], match=match, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        # The schedule of learning rates is that of MAX_ITER all the same.
        self.max_iter = min(cfg.MODEL.GNP.STOP_AT or cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_ITER)
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        hooks = super().build_hooks()
        period = self.cfg.MODEL.GNP.PROBE_PERIOD
        if period:
            # After the timer, before the writers, which write what other hooks have put.
            probe = GradientProbe(self.checkpointer.model, lambda: self.extra_batches(1), period)
            hooks.insert(1, probe)
        if self.cfg.TEST.AUG.ENABLED:
            model, kinds = self.checkpointer.model, [type(hook) for hook in hooks]
            augmented = EvalHook(0, lambda: self.test_with_TTA(self.cfg, model))
            hooks.insert(kinds.index(EvalHook) + 1, augmented)  # before the writers
        return hooks

    def train(self) -> Any:
        if self.start_iter > self.max_iter:
            raise ValueError(
                f"SOLVER.MAX_ITER {self.max_iter} must be at least the {self.start_iter} that the "
                f"checkpoint in {self.cfg.OUTPUT_DIR!r} has"
            )
        model = self.checkpointer.model  # not wrapped for DDP
        if any(norm.num_groups is None for norm in measured_norms(model).values()):
            batches = self._few_batches("CALIBRATION_BATCHES")
            with EventStorage():  # the model's own scalars are not training's
                calibrate_measured(model, batches)
        if self.checkpointer.other_norms.record and self.cfg.MODEL.GNP.MATCH_BATCHES:
            match_loaded(model, self.checkpointer.other_norms, self._few_batches("MATCH_BATCHES"))
        if comm.is_main_process():
            write_group_report(model, self.cfg.OUTPUT_DIR)
        with without_traceback("detectron2.engine.train_loop"):
            return super().train()

    def _few_batches(self, key: str) -> list[Any]:
        count = self.cfg.MODEL.GNP[key]
        images = sum(len(DatasetCatalog.get(name)) for name in self.cfg.DATASETS.TRAIN)
        if count * self.cfg.SOLVER.IMS_PER_BATCH > images:
            raise ValueError(
                f"MODEL.GNP.{key} {count} of SOLVER.IMS_PER_BATCH "
                f"{self.cfg.SOLVER.IMS_PER_BATCH} are more than the {images} training images. A "
                f"few dozen are enough."
            )
        return self.extra_batches(count)

    def extra_batches(self, count: int) -> list[Any]:
        """Training batches from a loader of their own, so that training goes on as without."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        python_random, numpy_random = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            batches = list(itertools.islice(iter(self.build_train_loader(cfg)), count))
        random.setstate(python_random)
        np.random.set_state(numpy_random)
        return batches

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as e:  # Detectron2's: has the iteration and the losses
            last_good = self.checkpointer.last_good()
            raise FloatingPointError(f"{e}\n{last_good} {self.finite_advice}") from e

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        if cfg.MODEL.BACKBONE.NAME.endswith("fpn_backbone") and not cfg.MODEL.FPN.IN_FEATURES:
            raise ValueError('MODEL.FPN.IN_FEATURES must name features, such as ["res2", "res3"]')
        model = super().build_model(cfg)
        require_resolved(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=CheckedMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = CheckedMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        results = super().test(cfg, model, evaluators)
        if scores := _headline(results):  # on the main process
            logger.info(
                "%s. Group counts: %s/groups.json. Predictions: %s/inference/predictions.png",
                *(scores, cfg.OUTPUT_DIR, cfg.OUTPUT_DIR),
            )
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation, as Detectron2's script does.

        Returns:
            What ``test`` does, the tasks called ``bbox_TTA`` and so on.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        os.makedirs(folder, exist_ok=True)
        evaluators = [build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        if scores := _headline(results):
            logger.info("With test-time augmentation: %s. Predictions: %s", scores, folder)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())

    @classmethod
    def evaluate(cls, cfg: CfgNode, *, resume: bool) -> dict:
        """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` OUTPUT_DIR's last checkpoint.

        Raises:
            ValueError: There is neither, or the file lacks a part of the model.
        """
        _log_to(cfg.OUTPUT_DIR)
        if comm.is_main_process():
            check_datasets(cfg, "TEST")
        comm.synchronize()
        model = cls.build_model(cfg)
        checkpointer = GNPCheckpointer.from_config(cfg, model, cfg.DATASETS.TEST[0])
        path = (resume and checkpointer.get_checkpoint_file()) or cfg.MODEL.WEIGHTS
        if not path:
            nor = f", and there is no checkpoint in {cfg.OUTPUT_DIR!r}" if resume else ""
            raise ValueError(f"There is nothing to evaluate: MODEL.WEIGHTS is empty{nor}")
        checkpointer.load_all(path, checkpointables=[])
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls.test_with_TTA(cfg, model))
        return results


def _inner_trainer(cfg: CfgNode, model: nn.Module, loader: Any, optimizer: Any) -> SimpleTrainer:
    trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
    if cfg.SOLVER.ACCUMULATE == 1:
        return trainer_class(model, loader, optimizer)
    scaler = torch.amp.GradScaler(enabled=cfg.SOLVER.AMP.ENABLED)
    options = {"grad_scaler": scaler} if cfg.SOLVER.AMP.ENABLED else {}
    grouped = Grouped(loader, cfg.SOLVER.ACCUMULATE)
    return trainer_class(
        Accumulated(model, scaler), grouped, optimizer, zero_grad_before_forward=True, **options
    )


def _headline(results: dict) -> str:
    return ", ".join(
        f"{task} {key} {_in_words(results[task][key])}"
        for task, key in HEADLINES.items()
        if key in results.get(task, {})
    )


def _in_words(score: float) -> str:
    return "nan (nothing predicted, or nothing to find)" if math.isnan(score) else f"{score:.1f}"


def _log_to(output_dir: str) -> None:
    # Detectron2's default_setup does this for its own loggers; a repeated call adds nothing.
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="gnpractical")


def adapt_to_device(cfg: CfgNode) -> None:
    """Turn what needs a GPU off, with one line said, where there is none."""
    changes = []
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        changes.append("MODEL.DEVICE cpu")
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMP trainer knows CUDA only
        changes.append("SOLVER.AMP.ENABLED False")
    if changes and os.environ.get("RANK", "0") == "0":  # torchrun's; no process group exists yet
        print(f"No GPU is available: running on the CPU ({', '.join(changes)})")
