"""The classes that a model predicts, as a checkpoint records them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch

from gnpractical.runs.errors import first_line

CLASSES_KEY = "gnp_classes"

# The names of its "things" and its "stuff" by the data set's category ids, in the model's order.
Classes = Mapping[str, Mapping[Any, str]]


def classes_in(path: str | os.PathLike) -> Classes:
    """The classes that the checkpoint at ``path`` records, {} if none.

    Raises:
        ValueError: It is no checkpoint of plain data. The message names it.
    """
    try:  # without reading its tensors
        classes = torch.load(path, "cpu", weights_only=True, mmap=True).get(CLASSES_KEY, {})
        check_classes(classes)
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"{path} is no checkpoint that this project wrote: {first_line(e)}") from e
    return classes


def check_classes(classes: Classes) -> None:
    """TypeError unless they are names."""
    for kind, names in classes.items():
        for number, name in names.items():
            if not isinstance(name, str):
                raise TypeError(f"its {CLASSES_KEY} has an odd entry of {kind}: {number}: {name!r}")


def describe_other_classes(mine: Classes, recorded: Classes) -> str:
    """The first class that differs; "" if none does, or one of both does not say."""
    for kind in ("things", "stuff"):
        own, other = list(mine.get(kind, {}).values()), list(recorded.get(kind, {}).values())
        if not own or not other:
            continue
        for number, (a, b) in enumerate(zip_longest(own, other, fillvalue="none")):
            if a != b:
                return f"number {number} of its {kind} is {b!r}, and {a!r} in the data set"
    return ""
