"""Checkpoints of ``tools/train_torchvision.py``: where a run begins, and of which model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gnpractical.runs.checkpointer import GroupCheckpointer
from gnpractical.runs.group_record import GroupRecord
from gnpractical.tv.distributed import all_gather

logger = logging.getLogger(__name__)


class TorchvisionCheckpointer(GroupCheckpointer):
    """A :class:`GroupCheckpointer` whose errors name the script's options."""

    _needs_all = False  # whether every parameter of the model has to be in the file

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
        self.load(weights, checkpointables=[])
        return 0

    def load_all(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """As ``load``, but raise ValueError unless the file has every parameter of the model."""
        self._needs_all = True
        return self.load(path, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        odd = [*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)]
        if self._needs_all and odd:
            raise ValueError(
                f"{self._loading} is of another model: {len(odd)} of the weights are missing or "
                f"of another shape, first {odd[0]}. Choose --model, --depth, --quick and --dataset "
                f"as it was trained with."
            )
        return incompatible
