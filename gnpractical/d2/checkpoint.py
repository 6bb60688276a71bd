"""Detectron2's checkpointer, with recorded and compared group counts and nothing executed."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from torch import nn

from gnpractical.runs.checkpointer import GroupCheckpointer
from gnpractical.runs.classes import Classes
from gnpractical.runs.file_weights import torch_load, unwrapped
from gnpractical.runs.group_record import GroupRecord, group_record
from gnpractical.runs.pretrained import PretrainedResNet, strides_in_1x1

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


# What a config calls the norms that are no GroupNorms, by their class.
_NORM_NAMES = {"BatchNorm2d": "BN", "FrozenBatchNorm2d": "FrozenBN", "SyncBatchNorm": "nnSyncBN"}


def classes_of(dataset: str) -> Classes:
    """The classes of a registered data set, as far as its metadata tell them by now."""
    metadata, classes = MetadataCatalog.get(dataset), {}
    for kind, key in (("things", "thing"), ("stuff", "stuff")):
        numbers = metadata.get(f"{key}_dataset_id_to_contiguous_id", {})
        ids = {number: category_id for category_id, number in numbers.items()}
        names = metadata.get(f"{key}_classes") or []
        classes[kind] = {ids.get(number, number): name for number, name in enumerate(names)}
    return classes


class GNPCheckpointer(GroupCheckpointer, DetectionCheckpointer):
    """Detectron2's checkpointer with what :class:`GroupCheckpointer` adds.

    ``.pth`` is read weights-only, the model zoo's ``.pkl`` through ``array_pickle``.

    Args:
        mismatch: what other group counts in a loaded file do: "error", "warn" or "ignore".
    """

    @classmethod
    def from_config(
        cls, cfg, model: nn.Module, dataset: str = "", **kwargs: Any
    ) -> GNPCheckpointer:
        """The checkpointer that ``cfg`` asks for, saving to its OUTPUT_DIR.

        Args:
            dataset: the data set whose classes the model predicts; "": they are not recorded.
        """
        mismatch = cfg.MODEL.GNP.CHECKPOINT_MISMATCH
        classes = classes_of(dataset) if dataset else None
        return cls(model, cfg.OUTPUT_DIR, mismatch=mismatch, classes=classes, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # After an error the base class leaves it set, and then refuses the next file.
            self._parsed_url_during_load = None

    def _read(self, filename: str) -> dict[str, Any]:
        """As Detectron2's ``_load_file``, whose pickles and .pyth files could run code."""
        if filename.endswith(".pyth"):  # pycls
            state = torch_load(filename)["model_state"]
            weights = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if not filename.endswith((".pkl", ".safetensors")):
            loaded = DetectionCheckpointer._load_file(self, filename)  # knows the path's options
            weights = loaded["model"].get("state_dict", loaded["model"])
            return loaded | {"model": unwrapped(weights)}
        loaded = super()._read(filename)
        if filename.endswith(".pkl") and "__author__" not in loaded:
            weights = {k: v for k, v in loaded["model"].items() if not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        return loaded

    def _torch_load(self, f: str) -> Any:  # DetectionCheckpointer's, which _load_file calls
        return torch_load(f)

    whole_model_advice = "Take the config and the data sets that it was trained with."
    load_anyway = "MODEL.GNP.CHECKPOINT_MISMATCH warn"

    def resnet_advice(self, resnet: PretrainedResNet) -> str:
        changes = {"NUM_GROUPS": resnet.num_groups, "WIDTH_PER_GROUP": resnet.width_per_group}
        if resnet.depth:
            changes = {"DEPTH": resnet.depth} | changes
        return ", ".join(f"MODEL.RESNETS.{key} {value}" for key, value in changes.items())

    def stride_advice(self, in_1x1: bool) -> str:
        return f"MODEL.RESNETS.STRIDE_IN_1X1 {in_1x1}"

    def prepared(self, resnet: PretrainedResNet) -> tuple[PretrainedResNet, list[str]]:
        model, changes = self.model, {}
        bgr = getattr(model, "input_format", "BGR") == "BGR"
        if bgr != resnet.bgr:
            changes["INPUT.FORMAT"] = "BGR" if resnet.bgr else "RGB"
        for key in ("pixel_mean", "pixel_std"):
            own, other = getattr(model, key, None), torch.tensor(getattr(resnet, key))
            if own is not None and not torch.allclose(
                own.flatten().cpu().float(), other, rtol=0.02
            ):
                changes[f"MODEL.{key.upper()}"] = [round(x, 3) for x in other.tolist()]
        advice = [f"{key} {value}" for key, value in changes.items()]
        if strides_in_1x1(model) not in (None, resnet.stride_in_1x1):
            advice.append(self.stride_advice(resnet.stride_in_1x1))
        return resnet, advice

    def advice(self, differing: list[str], record: GroupRecord) -> str:
        return (
            f"To match the file: {self._overrides(differing, record)}. To carry its weights over "
            f"to the model's norms at the start of training: MODEL.GNP.MATCH_BATCHES 2"
        )

    def _overrides(self, differing: list[str], record: GroupRecord) -> str:
        mine = group_record(self.model)
        wanted: dict[str, set[str]] = {}
        standardized = set()
        for name in differing:
            prefix = next((p for p in _NORM_KEYS if name.startswith(p)), None)
            if record[name]["num_groups"] != mine[name]["num_groups"]:
                key = _NORM_KEYS.get(prefix or "", "the norm of " + name.rpartition(".")[0])
                norm = record[name]["norm"]
                wanted.setdefault(key, set()).add(_NORM_NAMES.get(norm, norm))
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
