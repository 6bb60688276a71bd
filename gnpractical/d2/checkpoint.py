"""Checkpoints that record every layer's group count, are checked, and are never half written."""

from __future__ import annotations

import logging
import os
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from gnpractical.analysis.calibration import measured_norms
from gnpractical.analysis.layer_report import group_report
from gnpractical.d2.array_pickle import load_arrays
from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.weight_standardization import WSConv2d

logger = logging.getLogger(__name__)

RECORD_KEY = "gnp_groups"
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


class GroupMismatch(ValueError):
    """A checkpoint was trained with other group counts than the model has."""


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
        broken = [n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise FloatingPointError(
                f"{name}: {len(broken)} parameters are not finite, first {broken[0]}; not saved. "
                f"{self.last_good()}"
            )
        data = {"model": self.model.state_dict(), RECORD_KEY: group_record(self.model)}
        data |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            _write_whole(path, lambda f: torch.save(data, f))
            _write_whole(
                os.path.join(self.save_dir, "last_checkpoint"),
                lambda f: f.write(os.path.basename(path).encode()),
            )
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
            _check_record(loaded.get(RECORD_KEY, {}))
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
            self._take_measured(record)
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

    def _take_measured(self, record: dict[str, dict[str, Any]]) -> None:
        """Give the model's GN_MEASURED norms the counts the file was calibrated to."""
        for name, norm in measured_norms(self.model).items():
            entry = record.get(name, {})
            if entry.get("norm") == norm.norm_name and entry["num_groups"]:
                norm.set_num_groups(entry["num_groups"])

    def _compare(self, record: dict[str, dict[str, Any]]) -> None:
        mine = group_record(self.model)
        # A file may cover a part of the model only, for example a backbone.
        differing = [n for n in mine if n in record and _settings(mine[n]) != _settings(record[n])]
        if not differing or self._mismatch == "ignore":
            return
        first = "; ".join(
            f"{n}: {_describe(record[n])} in the file, {_describe(mine[n])} in the model"
            for n in differing[:3]
        )
        message = (
            f"{self._loading} was trained with other group counts: {len(differing)} of "
            f"{len(mine)} norms differ. {first}. To match the file: "
            f"{self._overrides(differing, record, mine)}. To load it all the same: "
            f"MODEL.GNP.CHECKPOINT_MISMATCH warn"
        )
        if self._mismatch == "error":
            raise GroupMismatch(message)
        logger.warning(message)

    def _overrides(self, differing: list[str], record: dict, mine: dict) -> str:
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


def group_record(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of each norm: plain data, by path.

    ``norm`` is the config string of a GroupNorm and the class of any other norm, whose
    ``num_groups`` is None.
    """
    record = {
        pair.norm_name: {
            "num_groups": None,
            "norm": type(pair.norm).__name__,
            "weight_standardized": isinstance(pair.layer, WSConv2d),
        }
        for pair in find_pairs(model)
    }
    for row in group_report(model):
        record[row.name] |= {"num_groups": row.num_groups, "norm": row.norm}
    return record


def _check_record(record: dict[str, dict[str, Any]]) -> None:
    for entry in record.values():
        if not {"num_groups", "norm", "weight_standardized"} <= entry.keys():
            raise KeyError(f"incomplete {RECORD_KEY}")


def _settings(entry: dict[str, Any]) -> tuple:
    return entry["num_groups"], entry["weight_standardized"]


def _describe(entry: dict[str, Any]) -> str:
    text = f"G={entry['num_groups']}" if entry["num_groups"] else entry["norm"]
    return f"{text} with weight standardization" if entry["weight_standardized"] else text


def _write_whole(path: str, write) -> None:
    part = f"{path}.part"
    try:
        f: IO[bytes]
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
