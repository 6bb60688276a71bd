"""Checkpoints of ``tools/train_torchvision.py``: where a run begins, and of which model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gnpractical.runs.checkpointer import GroupCheckpointer
from gnpractical.runs.group_record import GroupRecord
from gnpractical.tv.distributed import check_same

logger = logging.getLogger(__name__)


class TorchvisionCheckpointer(GroupCheckpointer):
    """A :class:`GroupCheckpointer` whose errors name the script's options."""

    _whole = False  # whether every parameter must be in the file

    def advice(self, differing: list[str], record: GroupRecord) -> str:
        norms = sorted({record[name]["norm"] for name in differing})
        standardized = any(record[name]["weight_standardized"] for name in differing)
        return (
            f"The file's norms there are {', '.join(norms)}, with{'' if standardized else 'out'} "
            f"weight standardization: choose --norm and --weight-standardization to match, or load "
            f"it all the same with --checkpoint-mismatch warn."
        )

    def start(self, weights: str, resume: bool) -> int:
        """Load the last checkpoint if ``resume`` and there is one, else ``weights``, if any.

        Returns:
            The iteration to begin with.

        Raises:
            ValueError: the last checkpoint is of another model, or not of all processes.
        """
        resume = resume and self.has_checkpoint()
        last = self.get_checkpoint_file() if resume else ""
        check_same(last, f"--output-dir {self.save_dir!r} must be on a disk of all machines")
        if resume:
            return self.load_all(last).get("iteration", -1) + 1
        if self.save_to_disk and self.has_checkpoint():
            logger.warning(
                "%s holds checkpoints of an earlier run, which this one does not go on "
                "from (--resume does) and will overwrite",
                self.save_dir,
            )
            Path(self.save_dir, "last_checkpoint").unlink()
        self.load(weights, checkpointables=[])
        return 0

    def load_all(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """As ``load``; ValueError unless the file has every parameter of the model."""
        self._whole = True
        return self.load(path, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        odd = [*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)]
        if self._whole and odd:
            raise ValueError(
                f"{self._loading} is of another model: {len(odd)} of the weights are missing or "
                f"of another shape, first {odd[0]}. Choose --model, --depth, --quick and --dataset "
                f"as it was trained with."
            )
        return incompatible
