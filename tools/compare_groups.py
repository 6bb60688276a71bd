#!/usr/bin/env python
"""Train a config with several group counts and seeds and compare them, as the paper's Tables 5, 6.

    python tools/compare_groups.py --config-file configs/quick/pfpn_gnp_shapes.yaml \\
        --groups 32 1 practical exact measured --seeds 3 --output output/compare [KEY VALUE ...]

Every norm of the config that is a GroupNorm gets the row's groups. Each run is a training of its
own (tools/train_net.py); one that was interrupted is resumed, one that has finished is not
repeated. Writes table.txt, results.json and the learning curves to the output folder.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from gnpractical.analysis.comparison import mean_and_spread, significant_differences
from gnpractical.analysis.plots import learning_curves
from gnpractical.d2 import load_config
from gnpractical.d2.norm import group_norm_keys

SCORES = (
    "panoptic_seg/PQ", "panoptic_seg/PQ_th", "panoptic_seg/PQ_st",
    "bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP",
)  # fmt: skip
JUDGED = ("panoptic_seg/PQ", "bbox/AP")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--groups", nargs="+", default=["32", "1", "practical"], metavar="ROW",
                        help="numbers, or practical, closest, exact, measured")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-gpus", type=int, default=1, help="as train_net.py's")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    return parser.parse_args()


def run_options(args, row, seed):
    keys = group_norm_keys(load_config(args.config_file, args.opts))
    norms = [word for key in keys for word in (key, f"GN_{row.upper()}")]
    folder = args.output / row / f"seed{seed}"
    return [*args.opts, *norms, "SEED", str(seed), "OUTPUT_DIR", str(folder)], folder


def train(args, row, seed):
    """One run's scores, losses, seconds a step and peak memory; from its result.json if it has."""
    opts, folder = run_options(args, row, seed)
    cfg = load_config(args.config_file, opts)
    settings, result = folder / "settings.yaml", folder / "result.json"
    if settings.exists() and settings.read_text() != cfg.dump():
        raise ValueError(
            f"{folder} holds a run with another config (see {settings}): use another --output"
        )
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(cfg.dump())
    script = Path(__file__).with_name("train_net.py")
    command = [sys.executable, str(script), "--resume", "--num-gpus", str(args.num_gpus),
               "--config-file", args.config_file, *opts]  # fmt: skip
    log = folder / "output.txt"
    with open(log, "a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        last = log.read_text().strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"row {row}, seed {seed} failed, see {log}: {last[0][:300]}")
    measured = read_metrics(folder, cfg.SOLVER.MAX_ITER)
    # KiB on Linux. On a GPU Detectron2 logs what PyTorch allocated at most.
    memory = re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text())
    measured["peak_memory_mib"] = int(memory[-1]) if memory else usage.ru_maxrss // 1024
    part = result.with_suffix(".part")
    part.write_text(json.dumps(measured, indent=1))
    part.replace(result)
    return measured


def read_metrics(folder, max_iter):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    # A run that was interrupted and resumed has written some iterations twice: the later counts.
    at = {line["iteration"]: line for line in lines if "total_loss" in line}
    curve = [(i, at[i]["total_loss"]) for i in sorted(at) if i < max_iter]
    last = {k: v for line in lines for k, v in line.items() if k in SCORES}
    times = [line["time"] for line in at.values() if "time" in line]
    return {"scores": last, "losses": curve, "seconds_per_step": statistics.median(times)}


def report(runs):
    present = [s for s in SCORES if any(s in r["scores"] for rs in runs.values() for r in rs)]
    table = [
        [row, len(results)]
        + [mean_and_spread([r["scores"][s] for r in results if s in r["scores"]]) for s in present]
        + [mean_and_spread([r["seconds_per_step"] for r in results], 3),
           f"{statistics.fmean(r['peak_memory_mib'] for r in results):.0f}"]
        for row, results in runs.items()
    ]  # fmt: skip
    names = [s.split("/")[1] if s.startswith("pan") else s.replace("/", " ") for s in present]
    text = tabulate(table, ["G", "runs", *names, "s/step", "peak MiB"], disable_numparse=True)
    for score in (s for s in JUDGED if s in present):
        samples = {row: [r["scores"][score] for r in results] for row, results in runs.items()}
        found = significant_differences(samples)
        text += f"\n{score}: differences beyond the noise (Tukey's range test, 5%): "
        text += "; ".join(f"{d.higher} over {d.lower} by {d.difference:.2f} (p {d.p_value:.3f})"
                          for d in found) or "none"  # fmt: skip
    return text


def main():
    args = parse_args()
    try:
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        todo = [(row, seed) for seed in range(1, args.seeds + 1) for row in args.groups]
        for row, seed in todo:  # errors before any training
            load_config(args.config_file, run_options(args, row, seed)[0])
        runs = {row: [] for row in args.groups}
        for row, seed in (bar := tqdm(todo, unit="run")):
            bar.set_description(f"G {row}, seed {seed}")
            runs[row].append(train(args, row, seed))
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    text = report(runs)
    (args.output / "table.txt").write_text(text + "\n")
    (args.output / "results.json").write_text(json.dumps(runs, indent=1))
    curves = {f"G {row}": average_curve(results) for row, results in runs.items()}
    picture = args.output / "learning_curves.png"
    learning_curves(curves, picture, "total loss, mean over seeds", xlabel="iteration")
    print(f"{text}\nWritten to {args.output}: table.txt, results.json, learning_curves.png")


def average_curve(results):
    at = {}
    for result in results:
        for iteration, loss in result["losses"]:
            at.setdefault(iteration, []).append(loss)
    return {i: statistics.fmean(losses) for i, losses in sorted(at.items())}


if __name__ == "__main__":
    main()
