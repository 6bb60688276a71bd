"""Rows of a comparison as trainings with ``tools/train_torchvision.py``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from gnpractical.tv.options import parse_args
from gnpractical.tv.run import build, check_numbers

# Of these the comparison says itself what they are.
_OWN = ("--norm", "--seed", "--output-dir", "--resume", "--stop-at", "--test-only")
# On these the result does not depend.
_WITHOUT = ("output_dir", "data_path", "device", "workers", "resume")


class TorchvisionRows:
    """The option ``--norm`` is the row's.

    Args:
        options: The script's other options.

    Raises:
        ValueError: One of the options is set by the row, or out of range.
    """

    def __init__(self, options: Sequence[str]) -> None:
        names = [option.partition("=")[0] for option in options]
        taken = [name for name in names if name in _OWN]
        if taken:
            raise ValueError(f"{taken[0]} is set by the comparison: leave it out")
        self._given = list(options)
        self._options = parse_args([*options, "--output-dir", ""])
        check_numbers(self._options)
        self.iterations = self._options.iterations

    def check(self, norm: str) -> None:
        """Raise ValueError if a model with this norm cannot be built."""
        build(dataclasses.replace(self._options, norm=norm), num_things=1, num_stuff=1)

    def settings(self, norm: str, seed: int) -> str:
        """What a run depends on, in lines."""
        options = vars(dataclasses.replace(self._options, norm=norm, seed=seed))
        return json.dumps({k: v for k, v in options.items() if k not in _WITHOUT}, indent=1)

    def command(self, norm: str, seed: int, folder: Path, stop_at: int = 0) -> list[str]:
        """Arguments of Python that train or go on training in ``folder``."""
        run = ["--norm", norm, "--seed", str(seed), "--output-dir", str(folder)]
        stop = ["--stop-at", str(stop_at)]
        return ["train_torchvision.py", *self._given, *run, *stop, "--resume"]
