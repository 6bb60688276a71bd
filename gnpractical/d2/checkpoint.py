"""Checkpoints that record every layer's group count, are checked, and are never half written."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from gnpractical.analysis.group_record import (
    RECORD_KEY,
    GroupMismatch,
    check_record,
    describe_mismatch,
    differing_norms,
    group_record,
    not_finite,
    take_measured,
)
from gnpractical.analysis.layer_report import group_report
from gnpractical.analysis.output_dir import write_atomically, write_text
from gnpractical.d2.array_pickle import load_arrays

logger = logging.getLogger(__name__)

# Which config key chooses the norms under a module path.
_NORM_KEYS = {
    "backbone.bottom_up": "MODEL.RESNETS.NORM",
    "backbone.fpn_": "MODEL.FPN.NORM",
    "backbone": "MODEL.RESNETS.NORM",
    "sem_seg_head": "MODEL.SEM_SEG_HEAD.NORM",
    "roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.NORM",
    "roi_heads.res5": "MODEL.RESNETS.NORM",
    "head": "MODEL.RETINANET.NORM",
}


class GNPCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, and

    * a record of the group counts in every file it writes, compared on loading;
    * files that appear complete or not at all, and only with finite weights;
    * nothing executed from a file: ``.pth`` is read weights-only, the model zoo's ``.pkl``
      through ``array_pickle``.

    Args:
        mismatch: what other group counts in a loaded file do: "error", "warn" or "ignore".
        gnp_backbone: the backbone's norm comes from MODEL.GNP.NORM (for the error's advice).
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        mismatch: str = "error",
        gnp_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self._mismatch = mismatch
        self._gnp_backbone = gnp_backbone
        self._loading = ""

    @classmethod
    def from_config(cls, cfg, model: nn.Module, **kwargs: Any) -> GNPCheckpointer:
        """The checkpointer that ``cfg`` asks for, saving to its OUTPUT_DIR."""
        return cls(
            model,
            cfg.OUTPUT_DIR,
            mismatch=cfg.MODEL.GNP.CHECKPOINT_MISMATCH,
            gnp_backbone="gnp" in cfg.MODEL.BACKBONE.NAME,
            **kwargs,
        )

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` and point ``last_checkpoint`` at it.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written.
            OSError: the file could not be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        broken = not_finite(self.model)
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
        self._loading = path
        if path and "://" not in path and not os.path.isfile(path):
            raise ValueError(f"Checkpoint {path!r} does not exist")
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the base class leaves it set after an error

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
        """As the base class's ``_load_file``, whose pickles and .pyth files could run code."""
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as f:
                data = load_arrays(f)
            if "model" in data and "__author__" in data:
                return data
            blobs = data.get("blobs", data)  # Caffe2's and Detectron1's
            weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):  # pycls
            state = self._torch_load(filename)["model_state"]
            weights = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        record = checkpoint.pop(RECORD_KEY, None)
        if record is not None:
            take_measured(self.model, record)
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
                    "an unknown number of groups (R-50-GN.pkl and other GN weights of the model "
                    "zoo: 32).", self._loading, len(loaded)
                )  # fmt: skip
        return incompatible

    def _compare(self, record: dict[str, dict[str, Any]]) -> None:
        differing = differing_norms(self.model, record)
        if not differing or self._mismatch == "ignore":
            return
        message = (
            f"{describe_mismatch(self._loading, self.model, record, differing)} To match the file: "
            f"{self._overrides(differing, record)}. To load it all the same: "
            f"MODEL.GNP.CHECKPOINT_MISMATCH warn"
        )
        if self._mismatch == "error":
            raise GroupMismatch(message)
        logger.warning(message)

    def _overrides(self, differing: list[str], record: dict) -> str:
        mine = group_record(self.model)
        wanted: dict[str, set[str]] = {}
        standardized = set()
        for name in differing:
            prefix = next((p for p in _NORM_KEYS if name.startswith(p)), None)
            if record[name]["num_groups"] != mine[name]["num_groups"]:
                key = _NORM_KEYS.get(prefix or "", "the norm of " + name.rpartition(".")[0])
                if self._gnp_backbone and name.startswith("backbone"):
                    key = "MODEL.GNP.NORM"
                wanted.setdefault(key, set()).add(record[name]["norm"])
            if record[name]["weight_standardized"] != mine[name]["weight_standardized"]:
                part = "backbone" if name.startswith("backbone") else prefix or name.split(".")[0]
                standardized.add((part, record[name]["weight_standardized"]))
        parts = [
            f"{key} {norms.pop()}" if len(norms) == 1 else f"{key} (a mix of {sorted(norms)})"
            for key, norms in wanted.items()
        ]
        parts += [
            f"{top!r} {'in' if on else 'out of'} MODEL.GNP.WEIGHT_STANDARDIZATION"
            for top, on in sorted(standardized)
        ]
        return ", ".join(parts)

