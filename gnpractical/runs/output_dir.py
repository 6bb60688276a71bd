"""What a training run writes to its folder: checked beforehand, every file whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout
from torch import nn

from gnpractical.measure.layer_report import format_report, group_report

logger = logging.getLogger(__name__)

RUN_FILE = ".lock"  # in every folder that a run has claimed
_ORPHAN_SECONDS = 15
_claimed: dict[Path, BaseFileLock] = {}  # held until the process ends


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


def claim_output_dir(output_dir: str | Path, option: str) -> None:
    """Keep other runs out of ``output_dir`` until this process ends.

    What a killed run left half written there is removed.

    Args:
        option: as of :func:`check_output_dir`.

    Raises:
        OSError: another run has it; the message says which.
    """
    folder = Path(output_dir).resolve()
    if folder in _claimed:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / RUN_FILE, f"process {os.getpid()} on {socket.gethostname()}"
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = path.read_text()
            if _is_alive(holder):
                raise OSError(
                    f"{option} {str(output_dir)!r} is in use by {holder}: two runs would mix "
                    f"their files. Take another folder, or wait for it to end"
                ) from None
            lock.acquire(timeout=_ORPHAN_SECONDS)  # its loaders' processes still end
    except NotImplementedError:
        logger.warning("%s: its disk knows no locks, so nothing keeps a second run out", folder)
    path.write_text(me)
    _claimed[folder] = lock
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)


def _is_alive(holder: str) -> bool:
    """Whether a process of this machine runs; True for other machines'."""
    match = re.fullmatch(r"process (\d+) on (.*)", holder)
    if match is None or match[2] != socket.gethostname():
        return True
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


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
    # Under a name of its own, should two write at once.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except RuntimeError as e:  # as torch.save calls what OSError is elsewhere
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} cannot be written ({e}); {free / 2**20:.0f} MiB are free") from e
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_atomically`, in UTF-8."""
    write_atomically(path, lambda f: f.write(text.encode()))
