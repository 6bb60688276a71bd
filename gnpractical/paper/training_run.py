"""One training of a comparison: started, resumed, or read from what it left.

Both training scripts write the same ``metrics.json``.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from gnpractical.runs.output_dir import write_text

SCORES = (
    "panoptic_seg/PQ",
    "panoptic_seg/PQ_th",
    "panoptic_seg/PQ_st",
    "bbox/AP",
    "bbox/AP50",
    "bbox/AP75",
    "segm/AP",
)
JUDGED = ("panoptic_seg/PQ", "bbox/AP")


class Diverged(ChildProcessError):
    """A run whose loss became infinite or nan."""


def train_once(
    command: list[str], folder: Path, settings: str, stop_at: int | None = None
) -> dict[str, Any]:
    """Train in ``folder`` by ``command``, unless its result is there.

    Args:
        command: Arguments of Python that train in ``folder`` and resume what they find there.
        settings: The run's whole config, in lines, which a run already in the folder must share.
        stop_at: The iteration at which ``command`` stops, None for the end of training.

    Returns:
        The ``scores`` of the last evaluation, ``losses`` as pairs of iteration and total loss,
        ``seconds_per_step`` and ``peak_memory_mib``.

    Raises:
        ValueError: The folder holds a run with another config, or a damaged result.
        Diverged: The loss became infinite or nan.
        ChildProcessError: The run failed.
    """
    result = folder / (f"result_{stop_at}.json" if stop_at else "result.json")
    config, log = folder / "settings.yaml", folder / "output.txt"
    if config.exists() and config.read_text() != settings:
        old = config.read_text().splitlines()
        first = next((x.strip() for x in settings.splitlines() if x not in old), "fewer keys")
        raise ValueError(
            f"{folder} holds a run with another config (now {first!r}; see {config}): use "
            f"another --output"
        )
    if result.exists():
        try:
            return _checked(json.loads(result.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{result} is damaged: remove it, and the run's scores are read again"
            ) from None
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(settings)
    with open(log, "a") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # a run that lives on would meet the next one in its folder
            process.terminate()
            raise
    if status:
        last = log.read_text().strip().splitlines()[-1:] or [""]
        error = Diverged if "The loss became" in last[0] else ChildProcessError
        raise error(f"{folder}: the run failed, see {log}: {last[0].removeprefix('error: ')[:300]}")
    measured = _read_metrics(folder / "metrics.json")
    if stop_at and measured["losses"] and measured["losses"][-1][0] >= stop_at:
        raise ValueError(
            f"{folder} holds a run that is past iteration {stop_at}: use another --output"
        )
    # KiB on Linux. On a GPU Detectron2 logs what PyTorch allocated at most.
    memory = re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text())
    measured["peak_memory_mib"] = int(memory[-1]) if memory else usage.ru_maxrss // 1024
    write_text(result, json.dumps(measured, indent=1))
    return measured


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """A result, or the error of what it lacks."""
    numbers = [result["seconds_per_step"], result["peak_memory_mib"], *result["scores"].values()]
    numbers += [value for pair in result["losses"] for value in pair]
    if not result["losses"] or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("without losses, or of no numbers")
    return result


def _read_metrics(path: Path) -> dict[str, Any]:
    steps: dict[int, dict[str, float]] = {}
    scores: dict[str, float] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn by an interruption
            continue
        # A run that was interrupted and resumed writes some iterations twice: the later counts.
        if "total_loss" in line:
            steps[line["iteration"]] = line
        scores = {key: line[key] for key in SCORES if key in line} or scores
    times = [line["time"] for line in steps.values() if "time" in line]
    return {
        "scores": scores,
        "losses": [(i, steps[i]["total_loss"]) for i in sorted(steps)],
        "seconds_per_step": statistics.median(times) if times else math.nan,
    }
