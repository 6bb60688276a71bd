"""Detectron2's DefaultTrainer with the group report, checked checkpoints, and CPU processes."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gnpractical.analysis.calibration import measured_norms
from gnpractical.analysis.distributed_calibration import calibrate_measured
from gnpractical.analysis.output_dir import check_disk_space, write_group_report
from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.evaluation import build_evaluator
from gnpractical.d2.preflight import check_datasets
from gnpractical.d2.probe import GradientProbe
from gnpractical.layers.pairing import require_resolved
from gnpractical.layers.weight_standardization import standardized_once

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """As ``DefaultTrainer``, but

    * calibrates GN_MEASURED norms and logs the group report, which it writes to
      ``OUTPUT_DIR/groups.json``, before the first step;
    * measures the gradient's variance each ``MODEL.GNP.PROBE_PERIOD`` iterations;
    * checks data sets, annotations and disk space before the first step;
    * saves and loads with :class:`GNPCheckpointer`;
    * evaluates with the evaluators of ``evaluation.build_evaluator``;
    * runs in several processes on CPU (gloo) as on GPUs (NCCL);
    * when the loss is no longer finite, names the last good checkpoint.

    Raises:
        ValueError: norms without a group count, data sets missing or wrong.
        OSError: too little disk space.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own __init__ cannot be extended: it wraps the model for GPUs only and
        # names its checkpointer. The order of the objects is the one it prescribes.
        TrainerBase.__init__(self)
        _log_to(cfg.OUTPUT_DIR)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if comm.is_main_process():
            check_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
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
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = GNPCheckpointer.from_config(cfg, model, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> Any:
        model = self._trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        if measured_norms(model):
            batches = self.first_batches(self.cfg.MODEL.GNP.CALIBRATION_BATCHES)
            with EventStorage():  # the model's own scalars are not training's
                calibrate_measured(model, batches)
        if comm.is_main_process():
            write_group_report(model, self.cfg.OUTPUT_DIR)
        if self.cfg.MODEL.GNP.PROBE_PERIOD:
            probe = GradientProbe(model, self.first_batches(1), self.cfg.MODEL.GNP.PROBE_PERIOD)
            self.register_hooks([probe])
            # After the timer, before the writers, which write what other hooks have put.
            self._hooks.insert(1, self._hooks.pop())
        return super().train()

    def first_batches(self, count: int) -> list[Any]:
        """The next ``count`` batches of training, which will still get them."""
        batches = list(itertools.islice(self._trainer._data_loader_iter, count))
        self._trainer._data_loader_iter_obj = itertools.chain(
            batches, self._trainer._data_loader_iter
        )
        return batches

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as e:  # Detectron2's: has the iteration and the losses
            raise FloatingPointError(
                f"{e}\n{self.checkpointer.last_good()} Try a lower SOLVER.BASE_LR, a longer "
                f"SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True."
            ) from e

    @property
    def last_results(self) -> dict:
        """Results of the last evaluation, {} before the first and on all ranks but 0."""
        return getattr(self, "_last_eval_results", None) or {}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        require_resolved(model)
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        with standardized_once(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def evaluate(cls, cfg: CfgNode, *, resume: bool) -> dict:
        """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` OUTPUT_DIR's last checkpoint."""
        _log_to(cfg.OUTPUT_DIR)
        if comm.is_main_process():
            check_datasets(cfg, cfg.DATASETS.TEST)
        comm.synchronize()
        model = cls.build_model(cfg)
        GNPCheckpointer.from_config(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        return cls.test(cfg, model)


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
