#!/usr/bin/env python
"""Kill every long-running tool at random moments, go on, and compare with a run left alone.

    python benchmarks/kills.py [--kills 5] [--seed 0]

Each tool is killed so many times, with its processes, at a random moment of its run; two are also
killed while a file is being written. Whatever it then has is gone on from. In the end it must have
come to the same iteration and the same scores: to the last digit where it goes on with the same
images, which Detectron2's sampler does not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

from gnpractical.datasets.shapes import make_shapes

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
TORCHVISION = (
    f"{TOOLS}/train_torchvision.py --quick --min-size 64 --lr 0.001 --iterations 12 "
    f"--checkpoint-period 2 --output-dir {{out}} --resume"
)
COMMANDS = {
    "train_torchvision": TORCHVISION,
    "two processes": f"-m torch.distributed.run --standalone --nproc-per-node 2 {TORCHVISION}",
    "train_net": (
        f"{TOOLS}/train_net.py --config-file {ROOT}/configs/quick/pfpn_gnp_shapes.yaml --resume "
        "SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 12 SOLVER.CHECKPOINT_PERIOD 2 SOLVER.BASE_LR 0.001 "
        "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 "
        "OUTPUT_DIR {out}"
    ),
    "train_classifier": (
        f"{TOOLS}/train_classifier.py --dataset {{data}}/classes --arch bottleneck11 "
        "--image-size 16 --groups 1 practical --seeds 1 --epochs 6 --workers 0 --output {out}"
    ),
    "train_mlp": (
        f"{TOOLS}/train_mlp.py --data {{data}} --groups 1 64 --seeds 1 --epochs 6 --output {{out}}"
    ),
    "compare_groups": (
        f"{TOOLS}/compare_groups.py --groups 1 --seeds 1 --output {{out}} --torchvision --quick "
        "--min-size 64 --lr 0.001 --iterations 12 --checkpoint-period 2"
    ),
}
WHILE_WRITING = ("train_torchvision", "train_net")


def make_data(folder):
    make_shapes(folder, {"train": 8, "val": 4})
    pixels = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "classes" / ("val" if i % 5 == 0 else "train") / f"class{i % 2}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"{i}.png")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):  # a magic number, the shape, the bytes
        sizes = np.array([2051, *pixels.shape], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(sizes + pixels.tobytes())
        labels = (np.arange(600) % 10).astype(np.uint8)
        sizes = np.array([2049, 600], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(sizes + labels.tobytes())


def start(command, data, out):
    words = command.format(data=data, out=out).split()
    log = open(out.with_suffix(".log"), "a")
    environment = os.environ | {"DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], stdout=log, stderr=log, env=environment, start_new_session=True
    )


def kill(process, name):
    """Kill a tool: of compare_groups the parent alone, whose training should not outlive it."""
    try:
        (os.kill if name == "compare_groups" else os.killpg)(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for_writing(process, out):
    while process.poll() is None and not list(out.rglob("*.part")):
        time.sleep(0.0005)


def result_of(name, out):
    """Return what a finished run came to, as text."""
    if name in ("train_classifier", "train_mlp"):
        records = json.loads((out / "results.json").read_text())["records"]
        return json.dumps([{k: v for k, v in r.items() if k != "seconds"} for r in records])
    if name == "compare_groups":
        (runs,) = json.loads((out / "results.json").read_text()).values()
        return json.dumps([run["scores"] for run in runs])
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    scores = {k: v for line in lines for k, v in line.items() if "/" in k and "time" not in k}
    if name == "train_net":
        last = max(line["iteration"] for line in lines if "total_loss" in line)
        return f"{last}, {'bbox/AP' in scores}"
    return json.dumps([max(line["iteration"] for line in lines), scores])


def finish(name, data, out):
    process = start(COMMANDS[name], data, out)
    if process.wait():
        raise RuntimeError(f"{name} failed:\n{out.with_suffix('.log').read_text()[-2000:]}")
    return result_of(name, out)


def killed_run(name, data, out, count, seconds, writing):
    """Return the result of a run that was killed ``count`` times."""
    done = 0
    while done < count:
        process = start(COMMANDS[name], data, out)
        if writing:
            wait_for_writing(process, out)
        else:
            time.sleep(random.uniform(0.1, 1) * seconds)
        if process.poll() is None:
            done += 1
        elif process.returncode:
            raise RuntimeError(f"{name} failed:\n{out.with_suffix('.log').read_text()[-2000:]}")
        else:  # it came to its end: another one is killed
            shutil.rmtree(out)
        kill(process, name)
    return finish(name, data, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each tool")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        make_data(data)
        for name in COMMANDS:
            begin = time.perf_counter()
            expected = finish(name, data, Path(folder, f"{name.replace(' ', '_')}_alone"))
            seconds = time.perf_counter() - begin
            for writing in (False, True) if name in WHILE_WRITING else (False,):
                out = Path(folder, f"{name.replace(' ', '_')}_{writing}")
                result = killed_run(name, data, out, args.kills, seconds, writing)
                moment = "while writing" if writing else "at random"
                rows.append([name, args.kills, moment, "same" if result == expected else "OTHER"])
                print(*rows[-1], flush=True)
                if result != expected:
                    print(f"expected {expected}\ngot      {result}")
    print(tabulate(rows, ["tool", "kills", "when", "result"]))
    sys.exit(any(row[-1] != "same" for row in rows))


if __name__ == "__main__":
    main()
