"""Rows of a comparison as trainings with ``tools/train_torchvision.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gnpractical.tv import quick
from gnpractical.tv.builders import norm_layer
from gnpractical.tv.training import TrainingRecipe

# Of these the comparison says itself what they are.
_OWN = ("--norm", "--seed", "--output-dir", "--resume", "--stop-at", "--test-only")


class TorchvisionRows:
    """The option ``--norm`` is the row's.

    Args:
        options: The script's other options.

    Raises:
        ValueError: One of the options is set by the row, or the iterations are no number.
    """

    def __init__(self, options: Sequence[str]) -> None:
        taken = [option for option in options if option in _OWN]
        if taken:
            raise ValueError(f"{taken[0]} is set by the comparison: leave it out")
        default = quick.OPTIONS["iterations"] if "--quick" in options else TrainingRecipe.iterations
        given = dict(zip(options, options[1:], strict=False)).get("--iterations", str(default))
        if not given.isdecimal():
            raise ValueError(f"--iterations must be a number, got {given!r}")
        self.iterations, self._options = int(given), list(options)

    def check(self, norm: str) -> None:
        """Raise ValueError if there is no such norm."""
        norm_layer(norm)

    def settings(self, norm: str, seed: int) -> str:
        """What a run depends on, in lines."""
        return "\n".join([*self._options, norm, str(seed)])

    def command(self, norm: str, seed: int, folder: Path, stop_at: int = 0) -> list[str]:
        """Arguments of Python that train or go on training in ``folder``."""
        run = ["--norm", norm, "--seed", str(seed), "--output-dir", str(folder)]
        stop = ["--stop-at", str(stop_at)]
        return ["train_torchvision.py", *self._options, *run, *stop, "--resume"]
