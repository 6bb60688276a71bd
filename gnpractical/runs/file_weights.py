"""What a file of weights may hold, and under which names."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gnpractical.runs.classes import CLASSES_KEY, check_classes
from gnpractical.runs.group_record import RECORD_KEY, check_record


def read_checked(filename: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What ``read`` gives of a file, or a ValueError that names the file and what is wrong."""
    try:
        loaded = read(filename)
        check_weights(loaded["model"])
        check_record(loaded.get(RECORD_KEY, {}))
        check_classes(loaded.get(CLASSES_KEY, {}))
        iteration = loaded.get("iteration", 0)
        if RECORD_KEY in loaded and not (isinstance(iteration, int) and iteration >= 0):
            raise TypeError(f"its iteration must be a number from 0 on, got {iteration!r}")
        return loaded
    except Exception as e:  # a damaged file can fail in any way
        reason = " ".join(str(e).split())[:300]
        if "weights_only" in reason:  # PyTorch advises to run its code
            reason = "it is no file of tensors and plain data that torch.save wrote"
        raise ValueError(
            f"{filename} is no checkpoint that can be loaded: it is missing, truncated, no "
            f"checkpoint, or would have to run code, which nothing here does. "
            f"{type(e).__name__}: {reason}"
        ) from e


def torch_load(path: str) -> Any:
    """What torch.save wrote, without running anything, and with the checksums looked at."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    # torch.save writes checksums, and torch.load does not look at them.
    if isinstance(loaded, dict) and RECORD_KEY in loaded and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of its part {damaged} is wrong")
    return loaded


def check_weights(weights: Mapping[str, Any]) -> None:
    """TypeError or ValueError if they are no tensors that a model can have."""
    if not weights or not all(isinstance(key, str) for key in weights):
        raise TypeError("it holds no tensors by name, nor has any under 'model' or 'state_dict'")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise TypeError(f"of its weights {name!r} is no tensor but a {type(value).__name__}")
        tensor = torch.as_tensor(value)
        if tensor.layout is not torch.strided:
            raise TypeError(f"its tensor {name!r} is sparse")
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"its tensor {name!r} holds values that are not finite")
            if name.endswith("running_var") and (tensor < 0).any():
                raise ValueError(f"its tensor {name!r} holds variances below zero")
        elif name.endswith((".weight", ".bias", ".running_mean", ".running_var", "_w", "_b", "_s")):
            raise TypeError(f"its tensor {name!r} holds {tensor.dtype}, not floating-point numbers")


def unwrapped(weights: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes that wrappers such as DDP and torch.compile give to all names."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if weights and all(isinstance(key, str) and key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights
