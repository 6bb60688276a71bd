"""Finding what a training run left: a checkpoint, and the file that says what the model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gnpractical.runs.checkpointer import GroupCheckpointer

OPTIONS_FILE = "options.json"  # of tools/train_torchvision.py
CONFIG_FILE = "config.yaml"  # of Detectron2


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint, and the options or the config of the run that wrote it.

    Attributes:
        weights: The checkpoint's path.
        description: The path of ``options.json`` or ``config.yaml``.
    """

    weights: Path
    description: Path

    @property
    def of_detectron2(self) -> bool:
        return self.description.name == CONFIG_FILE


def find_run(weights: str) -> SavedRun:
    """The run that ``weights`` mean.

    Args:
        weights: A run's folder, whose last checkpoint is meant, or a checkpoint in it.

    Raises:
        ValueError: There is no checkpoint, or nothing that says what the model is.
    """
    path = Path(weights)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        last = GroupCheckpointer(nn.Module(), str(folder)).get_checkpoint_file()
        if not last:
            raise ValueError(f"--weights {weights!r}: there is no checkpoint in this folder")
        path = Path(last)
    if not path.is_file():
        raise ValueError(f"--weights {weights!r}: {path} does not exist")
    descriptions = [folder / name for name in (OPTIONS_FILE, CONFIG_FILE)]
    written = [file for file in descriptions if file.is_file()]
    if written:  # by several runs, one after the other, if there are two
        return SavedRun(path, max(written, key=lambda file: file.stat().st_mtime))
    raise ValueError(
        f"--weights {weights!r}: {folder} has neither {OPTIONS_FILE}, which train_torchvision.py "
        f"leaves, nor {CONFIG_FILE}, which train_net.py leaves: without them it is not known what "
        f"the model is. Leave the checkpoint in its run's folder, or put the file beside it"
    )
