"""Checkpoints of ``tools/train_torchvision.py``: where a run begins, and of which model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from gnpractical.measure.calibration import measured_norms
from gnpractical.runs.checkpointer import GroupCheckpointer
from gnpractical.runs.group_record import GroupRecord
from gnpractical.runs.pretrained import PretrainedResNet, strides_in_1x1
from gnpractical.tv.distributed import all_gather

logger = logging.getLogger(__name__)

DEPTHS = (18, 34, 50, 101)  # of the ResNets that the builders know


def require_measured(model: nn.Module, path: str) -> None:
    """ValueError if GN_MEASURED norms got no counts from the file at ``path``."""
    if any(norm.num_groups is None for norm in measured_norms(model).values()):
        raise ValueError(
            f"{path} has no measured group counts: it was not trained with --norm GN_MEASURED"
        )


class TorchvisionCheckpointer(GroupCheckpointer):
    """A :class:`GroupCheckpointer` whose errors name the script's options."""

    whole_model_advice = "Choose --model, --depth, --quick and --dataset as it was trained with."
    load_anyway = "--checkpoint-mismatch warn"

    def advice(self, differing: list[str], record: GroupRecord) -> str:
        norms = sorted({record[name]["norm"] for name in differing})
        standardized = any(record[name]["weight_standardized"] for name in differing)
        return (
            f"The file's norms there are {', '.join(norms)}, with{'' if standardized else 'out'} "
            f"weight standardization: choose --norm and --weight-standardization to match, or "
            f"carry its weights over at the start of training with --match-batches 2"
        )

    def resnet_advice(self, resnet: PretrainedResNet) -> str:
        plain = (resnet.num_groups, resnet.width_per_group) == (1, 64)
        if resnet.depth not in DEPTHS or not plain:
            depths = ", ".join(map(str, DEPTHS))
            return f"weights of a plain ResNet of depth {depths}, 64 channels wide at first"
        return f"--depth {resnet.depth}"

    def stride_advice(self, in_1x1: bool) -> str:
        return f"--stride-in-1x1 {'given' if in_1x1 else 'left out'}"

    def prepared(self, resnet: PretrainedResNet) -> tuple[PretrainedResNet, list[str]]:
        resnet, changes = resnet.for_rgb(), []
        transform = self.model.transform
        for name in ("mean", "std"):
            own = torch.tensor(getattr(transform, f"image_{name}"))
            other = torch.tensor(getattr(resnet, f"pixel_{name}")) / 255
            if not torch.allclose(own, other, rtol=0.02):
                changes.append(f"image_{name}={[round(x, 3) for x in other.tolist()]}")
        if strides_in_1x1(self.model) not in (None, resnet.stride_in_1x1):
            changes.append(self.stride_advice(resnet.stride_in_1x1))
        return resnet, changes

    def load_backbone(self, path: str) -> None:
        """Load the ResNet of a file, and nothing else of it.

        Raises:
            ValueError: There is none. And as ``load``.
        """
        self._backbone_only = True
        try:
            self.load(path, checkpointables=[])
        finally:
            self._backbone_only = False

    def start(self, weights: str, weights_backbone: str, resume: bool) -> int:
        """Load the last checkpoint if ``resume`` and there is one, else what is given, if any.

        Returns:
            The iteration to begin with.

        Raises:
            ValueError: The last checkpoint is of another model, or some processes do not see it.
        """
        last = self.get_checkpoint_file() if resume else ""
        seen = all_gather(last)
        if len(set(seen)) > 1:
            raise ValueError(
                f"--output-dir {self.save_dir!r} must be on a disk of all machines, "
                f"but its last checkpoint is, by process: {seen}"
            )
        if last:
            return self.load_all(last).get("iteration", -1) + 1
        if self.save_to_disk and self.has_checkpoint():
            logger.warning(
                "%s holds checkpoints of an earlier run, which this one does not go on "
                "from (--resume does) and will overwrite",
                self.save_dir,
            )
            Path(self.save_dir, "last_checkpoint").unlink()
        if weights_backbone:
            self.load_backbone(weights_backbone)
        else:
            self.load(weights, checkpointables=[])
        return 0
