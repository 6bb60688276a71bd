"""One training run of a comparison: started, resumed, or read from what it left."""

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

from detectron2.config import CfgNode

from gnpractical.analysis.output_dir import write_text

SCORES = (
    "panoptic_seg/PQ", "panoptic_seg/PQ_th", "panoptic_seg/PQ_st",
    "bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP",
)  # fmt: skip


def train_once(command: list[str], cfg: CfgNode) -> dict[str, Any]:
    """Train in ``cfg.OUTPUT_DIR`` by ``command``, unless its result is there.

    Args:
        command: arguments of Python that train ``cfg`` and resume.

    Returns:
        ``scores`` of the last evaluation, ``losses`` as (iteration, total loss),
        ``seconds_per_step`` and ``peak_memory_mib``.

    Raises:
        ValueError: the folder holds a run with another config, or a damaged result.
        RuntimeError: the run failed.
    """
    folder = Path(cfg.OUTPUT_DIR)
    settings, result = folder / "settings.yaml", folder / "result.json"
    if settings.exists() and settings.read_text() != _settings_of(cfg):
        old, new = settings.read_text().splitlines(), _settings_of(cfg).splitlines()
        first = next((line.strip() for line in new if line not in old), "fewer keys")
        raise ValueError(
            f"{folder} holds a run with another config (now {first!r}; see {settings}): use "
            f"another --output"
        )
    if result.exists():
        return read_result(result)
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(_settings_of(cfg))
    log = folder / "output.txt"
    with open(log, "a") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # a run that lives on would meet the next one in its folder
            process.terminate()
            raise
    if status:
        last = log.read_text().strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"{folder}: the run failed, see {log}: {last[0][:300]}")
    measured = read_metrics(folder, cfg.SOLVER.MAX_ITER)
    # KiB on Linux. On a GPU Detectron2 logs what PyTorch allocated at most.
    memory = re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text())
    measured["peak_memory_mib"] = int(memory[-1]) if memory else usage.ru_maxrss // 1024
    write_text(result, json.dumps(measured, indent=1))
    return measured


def read_result(path: Path) -> dict[str, Any]:
    """The content of a run's result.json; ValueError if it is damaged."""
    try:
        result = json.loads(path.read_text())
        if result.keys() >= {"scores", "losses", "seconds_per_step", "peak_memory_mib"}:
            return result
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged: remove it, and the run's scores are read again")


def read_metrics(folder: Path, max_iter: int) -> dict[str, Any]:
    """Scores, losses and time a step from a run's metrics.json."""
    lines = []
    for line in (folder / "metrics.json").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # torn by an interruption
            continue
    # A run that was interrupted and resumed has written some iterations twice: the later counts.
    at = {line["iteration"]: line for line in lines if "total_loss" in line}
    curve = [(i, at[i]["total_loss"]) for i in sorted(at) if i < max_iter]
    evaluations = [{k: line[k] for k in SCORES if k in line} for line in lines]
    evaluations = [scores for scores in evaluations if scores]
    times = [line["time"] for line in at.values() if "time" in line]
    return {
        "scores": evaluations[-1] if evaluations else {},
        "losses": curve,
        "seconds_per_step": statistics.median(times) if times else math.nan,
    }


def _settings_of(cfg: CfgNode) -> str:
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = ""  # the folder may be called by another name
    return cfg.dump()
