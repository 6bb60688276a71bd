"""What a file may hold as weights, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


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
