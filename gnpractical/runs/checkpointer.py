"""Checkpoints that record every layer's group count, are checked, and are never half written."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from safetensors.torch import load_file
from torch import nn

from gnpractical.measure.layer_report import group_report
from gnpractical.runs.array_pickle import load_arrays
from gnpractical.runs.carry_over import OtherNorms, statistics_left
from gnpractical.runs.classes import CLASSES_KEY, Classes, describe_other_classes
from gnpractical.runs.file_weights import read_checked, torch_load, unwrapped
from gnpractical.runs.group_record import (
    RECORD_KEY,
    GroupMismatch,
    GroupRecord,
    describe_mismatch,
    differing_norms,
    group_record,
    record_of_batch_norms,
    take_recorded,
)
from gnpractical.runs.output_dir import write_atomically, write_text
from gnpractical.runs.pretrained import PretrainedResNet, place, recognize, strides_in_1x1
from gnpractical.runs.resnet_names import of_detectors

logger = logging.getLogger(__name__)

_STRIDES_KEY = "gnp_stride_in_1x1"


class GroupCheckpointer(Checkpointer):
    """fvcore's checkpointer, and

    * a record of the group counts, classes and strides in every file, compared on loading;
    * files that appear complete or not at all, and only with finite weights;
    * weights of ResNets as others published them (see ``pretrained``), for the backbone;
    * nothing executed from a file.

    Subclasses say in four methods how a user makes the model match.

    Args:
        mismatch: what a loaded file does that was trained with other group counts, or on other
            images, than the model's: "error", "warn" or "ignore".
        match: other norms in the file that training begins with are no mismatch, since they
            will be matched.
        classes: what the model predicts, if it is known. A run that goes on, or is evaluated, must
            have those of its checkpoint.

    Attributes:
        other_norms (OtherNorms): those of the file that training begins with.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        mismatch: str = "error",
        match: bool = False,
        classes: Classes | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self.other_norms = OtherNorms()
        self._mismatch = mismatch
        self._classes = classes or {}
        self._match, self._begins = match, False
        self._loading = ""

    def advice(self, differing: list[str], record: GroupRecord) -> str:
        """What to change so that the norms ``differing`` match ``record``, or are matched."""
        raise NotImplementedError

    def resnet_advice(self, resnet: PretrainedResNet) -> str:
        """What to change so that the model's ResNet has the file's depth and widths."""
        raise NotImplementedError

    def prepared(self, resnet: PretrainedResNet) -> tuple[PretrainedResNet, list[str]]:
        """The weights for the images that this model takes, and what to change to match them."""
        raise NotImplementedError

    def stride_advice(self, in_1x1: bool) -> str:
        """What to change so that bottlenecks stride in their 1x1 convolution, or do not."""
        raise NotImplementedError

    whole_model_advice = ""  # what to do when a file lacks a part of the model
    load_anyway = ""  # what to change so that a file is loaded though it does not match, if any
    _needs_all = False  # whether everything of the model has to be in the file
    _backbone_only = False  # whether a file's ResNet is wanted, and nothing else of it

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
        data |= {CLASSES_KEY: self._classes, _STRIDES_KEY: strides_in_1x1(self.model)}
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

    def get_checkpoint_file(self) -> str:
        """As the base class's, or a ValueError if the file that names it does not."""
        path = Path(self.save_dir, "last_checkpoint")
        try:
            last = super().get_checkpoint_file()
        except ValueError as e:
            raise ValueError(f"{path} does not hold the name of a file: {e}") from e
        if last and not os.path.basename(last):
            raise ValueError(f"{path} does not hold the name of a file: it is empty")
        return last

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As the base class's.

        Raises:
            GroupMismatch: trained with other group counts, or on other images.
            ValueError: missing, damaged, or of another model; the message names the file.
        """
        self._loading = path
        self._begins = checkpointables == []  # nor resumed
        # Detectron2 takes options behind a question mark.
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise ValueError(f"Checkpoint {path!r} does not exist")
        return super().load(path, checkpointables)

    def load_all(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As ``load``, but raise ValueError unless the file has all weights of the model."""
        self._needs_all = True
        try:
            return self.load(path, checkpointables)
        finally:
            self._needs_all = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's, but a run's own checkpoint must have all weights."""
        if resume and self.has_checkpoint():
            return self.load_all(self.get_checkpoint_file())
        return super().resume_or_load(path, resume=False)

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_checked(filename, self._read)
        return self._published(loaded) or loaded

    def _read(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            with self.path_manager.open(filename, "rb") as f:
                loaded = load_arrays(f)
            loaded = loaded.get("blobs", loaded)  # Caffe2's and Detectron1's
        elif filename.endswith(".safetensors"):
            loaded = load_file(filename)
        else:
            loaded = torch_load(filename)
        if "model" not in loaded:
            loaded = {"model": loaded.get("state_dict", loaded)}
        return loaded | {"model": unwrapped(loaded["model"])}

    def _published(self, loaded: dict[str, Any]) -> dict[str, Any] | None:
        """What ``loaded`` holds of a ResNet by the model's names, if it holds one."""
        weights = loaded["model"]
        mine = self.model.state_dict().keys()
        if 2 * len(weights.keys() & mine) > len(weights) and not self._backbone_only:
            return None  # it is the model's own
        try:
            resnet = recognize(weights, loaded.get(RECORD_KEY, {}))
            if resnet is None and self._backbone_only:
                raise ValueError("it holds no ResNet, by the names of its tensors")
            if resnet is None:
                return None
            described, (resnet, changes) = str(resnet), self.prepared(resnet)
            tensors, record = place(resnet, self.model, self.resnet_advice(resnet))
        except ValueError as e:
            raise ValueError(f"{self._loading}: {e}") from None
        heads = of_detectors(resnet.other)
        if heads and not self._backbone_only:
            self._complain(
                f"{self._loading} is a whole detector under other names than the model's. Of it "
                f"only the backbone, a {described}, would be loaded, and {len(heads)} tensors of "
                f"its heads left out, first {heads[0]}."
            )
        if changes:
            self._complain(
                f"{self._loading} is a {described}, which was trained on other images or with "
                f"other strides. To match it: {', '.join(changes)}."
            )
        used = sum(name in mine for name in tensors)
        logger.info(
            "%s is a %s: %d of its %d tensors are used. Left are %d statistics of BatchNorm, %d "
            "of stages that the model does not have, and %d that are no ResNet's, such as a "
            "classifier.",
            *(self._loading, described, used, len(weights), len(tensors) - used),
            *(len(weights) - len(tensors) - len(resnet.other), len(resnet.other)),
        )
        return {"model": tensors, RECORD_KEY: record}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint["model"]
        record = checkpoint.pop(RECORD_KEY, None) or record_of_batch_norms(self.model, weights)
        try:
            take_recorded(self.model, record)
        except ValueError as e:
            raise GroupMismatch(f"{self._loading} was trained with other groups: {e}") from None
        differing = differing_norms(self.model, record)
        other_norms = OtherNorms.of(self._loading, {n: record[n] for n in differing}, weights)
        if differing and not (self._match and self._begins):
            self._complain(
                f"{describe_mismatch(self._loading, self.model, record, differing)} "
                f"{self.advice(differing, record)}."
            )
        strides, own = checkpoint.pop(_STRIDES_KEY, None), strides_in_1x1(self.model)
        if None not in (strides, own) and strides != own:
            self._complain(
                f"{self._loading} was trained with other strides. To match it: "
                f"{self.stride_advice(strides)}."
            )
        odd_class = describe_other_classes(self._classes, checkpoint.pop(CLASSES_KEY, {}))
        if self._needs_all and odd_class:
            self._complain(
                f"{self._loading} predicts other classes than the data set has: {odd_class}. "
                f"{self.whole_model_advice}"
            )
        for name in statistics_left(self.model, weights):
            del weights[name]
        incompatible = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        missing = parameters & set(incompatible.missing_keys)
        missing |= {name for name, *_ in incompatible.incorrect_shapes}
        if parameters and parameters <= missing:
            raise ValueError(
                f"{self._loading}: none of the model's {len(parameters)} parameters is in this "
                f"file; it belongs to another model."
            )
        count = len(weights)
        used = count - len(incompatible.unexpected_keys) - len(incompatible.incorrect_shapes)
        if 2 * used < count:
            self._complain(
                f"{self._loading}: only {used} of its {count} tensors are of this model."
            )
        odd = [*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)]
        if self._needs_all and odd:
            raise ValueError(
                f"{self._loading} is of another model: {len(odd)} of the weights are missing or "
                f"of another shape, first {odd[0]}. {self.whole_model_advice}"
            )
        if self._begins:
            self.other_norms = other_norms
        loaded = [r for r in group_report(self.model) if f"{r.name}.weight" not in missing]
        unknown = [r for r in loaded if r.name not in record]
        if unknown:
            logger.warning(
                "%s has no record of group counts: %d GroupNorm layers got weights trained at "
                "an unknown number of groups (those of model zoos: 32).",
                self._loading,
                len(unknown),
            )
        return incompatible

    def _complain(self, message: str) -> None:
        if self._mismatch == "error":
            anyway = f" To load it all the same: {self.load_anyway}." if self.load_anyway else ""
            raise GroupMismatch(message + anyway)
        if self._mismatch == "warn":
            logger.warning(message)
