"""Replacing a function of Detectron2 for everybody who uses it."""

from __future__ import annotations

import sys
from collections.abc import Callable


def rebind(old: Callable, new: Callable) -> None:
    """Bind ``new`` to every name of every loaded module that is bound to ``old``.

    Detectron2's functions are imported by name into a dozen of its modules and into users' own.
    Modules that are loaded later import from those, and so get ``new``.
    """
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
