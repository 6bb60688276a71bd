"""Checkpoints that record every layer's group count, are checked, and are never half written."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from gnpractical.measure.layer_report import group_report
from gnpractical.runs.group_record import (
    RECORD_KEY,
    GroupMismatch,
    GroupRecord,
    check_record,
    describe_mismatch,
    differing_norms,
    group_record,
    take_measured,
)
from gnpractical.runs.output_dir import write_atomically, write_text

logger = logging.getLogger(__name__)


class GroupCheckpointer(Checkpointer):
    """fvcore's checkpointer, and

    * a record of the group counts in every file it writes, compared on loading;
    * files that appear complete or not at all, and only with finite weights;
    * nothing executed from a file.

    Subclasses say in :meth:`advice` how a user makes the model match.

    Args:
        mismatch: what other group counts in a loaded file do: "error", "warn" or "ignore".
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, mismatch: str = "error", **kwargs: Any
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._mismatch = mismatch
        self._loading = ""

    def advice(self, differing: list[str], record: GroupRecord) -> str:
        """What to change so that the norms ``differing`` match ``record``, or to load anyway."""
        raise NotImplementedError

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` and point ``last_checkpoint`` at it.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
            OSError: the file could not be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        broken = [n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise FloatingPointError(
                f"{name}: {len(broken)} parameters are not finite, first {broken[0]}; not saved. "
                f"{self.last_good()}"
            )
        data = {"model": self.model.state_dict(), RECORD_KEY: group_record(self.model)}
        data |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data |= kwargs
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            write_atomically(path, lambda f: torch.save(data, f))
            write_text(path.with_name("last_checkpoint"), path.name)
        except (OSError, RuntimeError) as e:
            raise OSError(f"{path} could not be written ({e}). {self.last_good()}") from e

    def last_good(self) -> str:
        """A sentence naming the last checkpoint."""
        if self.has_checkpoint():
            return f"The last good checkpoint is {self.get_checkpoint_file()}."
        return f"There is no checkpoint in {self.save_dir} yet."

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base class's.

        Raises:
            GroupMismatch: trained with other group counts.
            ValueError: missing, damaged, or of another model; the message names the file.
        """
        self._loading = path
        # Detectron2 takes options behind a question mark.
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise ValueError(f"Checkpoint {path!r} does not exist")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = self._read(filename)
            weights = loaded["model"]
            if not all(isinstance(w, (torch.Tensor, np.ndarray)) for w in weights.values()):
                raise TypeError("its 'model' holds more than tensors")
            check_record(loaded.get(RECORD_KEY, {}))
        except Exception as e:  # a damaged file can fail in any way
            reason = " ".join(str(e).split())[:300]
            raise ValueError(
                f"{filename} is no checkpoint that can be loaded: it is missing, truncated, no "
                f"checkpoint, or would have to run code, which nothing here does. "
                f"{type(e).__name__}: {reason}"
            ) from e
        return loaded

    def _read(self, filename: str) -> dict[str, Any]:
        loaded = self._torch_load(filename)
        return loaded if "model" in loaded else {"model": loaded}  # a bare state_dict

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        record = checkpoint.pop(RECORD_KEY, None)
        if record is not None:
            try:
                take_measured(self.model, record)
            except ValueError as e:
                raise GroupMismatch(f"{self._loading} was trained with other groups: {e}") from None
            self._compare(record)
        incompatible = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        missing = parameters & set(incompatible.missing_keys)
        missing |= {name for name, *_ in incompatible.incorrect_shapes}
        if parameters and parameters <= missing:
            raise ValueError(
                f"{self._loading}: none of the model's {len(parameters)} parameters is in this "
                f"file; it belongs to another model."
            )
        if record is None:
            loaded = [r for r in group_report(self.model) if f"{r.name}.weight" not in missing]
            if loaded:
                logger.warning(
                    "%s has no record of group counts: %d GroupNorm layers got weights trained at "
                    "an unknown number of groups (those of model zoos, such as R-50-GN.pkl: 32).",
                    self._loading,
                    len(loaded),
                )
        return incompatible

    def _compare(self, record: GroupRecord) -> None:
        differing = differing_norms(self.model, record)
        if not differing or self._mismatch == "ignore":
            return
        message = (
            f"{describe_mismatch(self._loading, self.model, record, differing)} "
            f"{self.advice(differing, record)}"
        )
        if self._mismatch == "error":
            raise GroupMismatch(message)
        logger.warning(message)
