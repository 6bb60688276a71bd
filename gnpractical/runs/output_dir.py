"""What a training run writes to its folder: checked beforehand, every file whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch import nn

from gnpractical.measure.layer_report import format_report, group_report

logger = logging.getLogger(__name__)


def check_output_dir(output_dir: str, option: str) -> None:
    """Create ``output_dir`` if need be.

    Args:
        option: the config key or option that named it, for the error.

    Raises:
        OSError: in one line, if nothing can be written there.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir):
            pass
    except OSError as e:
        raise OSError(f"{option} {output_dir!r} cannot be written: {e}") from None


def check_disk_space(output_dir: str, model: nn.Module, count: int, option: str) -> None:
    """OSError if two checkpoints do not fit on the disk; a warning if ``count`` do not."""
    # Weights, and for the trained ones SGD's momentum, in the parameters' own type.
    size = sum(
        p.numel() * p.element_size() * (2 if p.requires_grad else 1) for p in model.parameters()
    )
    free = shutil.disk_usage(output_dir).free
    text = (
        f"{free / 2**20:.0f} MiB are free for {option} {output_dir!r}; a checkpoint takes "
        f"about {size / 2**20:.0f} MiB, and the run keeps {count}"
    )
    if free < 2 * size:
        raise OSError(f"Disk full: {text}.")
    if free < count * size:
        logger.warning("The disk will not hold every checkpoint: %s.", text)


def write_group_report(model: nn.Module, output_dir: str) -> None:
    """Log the group report of ``model`` and write its rows to ``output_dir/groups.json``."""
    rows = group_report(model)
    logger.info("Group counts:\n%s", format_report(rows))
    path = Path(output_dir, "groups.json")
    write_text(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    logger.info("Group counts written to %s", path)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place in one step."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_atomically`, in UTF-8."""
    write_atomically(path, lambda f: f.write(text.encode()))
