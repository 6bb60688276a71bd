"""Rows of a comparison as trainings with ``tools/train_net.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import build_model

from gnpractical.d2.config import load_config
from gnpractical.d2.norm import group_norm_keys
from gnpractical.measure.layer_report import group_report


class Detectron2Rows:
    """Every norm of a config that is a GroupNorm gets the row's ``norm``, such as "GN_32".

    Args:
        config_file, opts: As of ``load_config``.
        num_gpus: As of the script.

    Raises:
        ValueError: The config cannot be read, or a key that the row sets is among ``opts``.
    """

    def __init__(self, config_file: str, opts: Sequence[str], num_gpus: int = 1) -> None:
        cfg = load_config(config_file, opts)
        self.iterations: int = cfg.SOLVER.MAX_ITER
        self._config_file, self._opts, self._num_gpus = config_file, opts, num_gpus
        self._keys = group_norm_keys(cfg)
        own = {"SEED", "OUTPUT_DIR", "MODEL.GNP.STOP_AT", *self._keys}
        if taken := [key for key in opts[::2] if key in own]:
            raise ValueError(f"{taken[0]} is set by the comparison: leave it out")

    def check(self, norm: str) -> None:
        """Raise ValueError if a model with this norm cannot be built."""
        cfg = load_config(self._config_file, self._options(norm))
        cfg.MODEL.DEVICE = "cpu"
        if not any(row.norm == norm for row in group_report(build_model(cfg))):
            raise ValueError(f"{self._config_file}: its model has no GroupNorm that rows could set")

    def settings(self, norm: str, seed: int) -> str:
        """What a run depends on, in lines; not its folder, which may be given another name."""
        options = [*self._options(norm), "SEED", str(seed), "OUTPUT_DIR", ""]
        return load_config(self._config_file, options).dump()

    def command(self, norm: str, seed: int, folder: Path, stop_at: int = 0) -> list[str]:
        """Arguments of Python that train or go on training in ``folder``."""
        flags = ["--resume", "--num-gpus", str(self._num_gpus), "--config-file", self._config_file]
        options = [*self._options(norm), "SEED", str(seed), "MODEL.GNP.STOP_AT", str(stop_at)]
        return ["train_net.py", *flags, *options, "OUTPUT_DIR", str(folder)]

    def _options(self, norm: str) -> list[str]:
        return [*self._opts, *(word for key in self._keys for word in (key, norm))]
