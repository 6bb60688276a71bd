"""Recognising PyTorch's activation functions, such as ``F.relu`` or ``Tensor.relu_``, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gnpractical.activation_gain import ACTIVATIONS

ACTIVATION_FUNCTIONS: dict[Callable, str] = {
    getattr(home, name + ending): name
    for name in ACTIVATIONS
    for home in (F, torch, Tensor)
    for ending in ("", "_")  # PyTorch ends the names of in-place functions in an underscore.
    if hasattr(home, name + ending)
} | {torch.special.expit: "sigmoid"}
