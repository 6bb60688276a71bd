"""A tool that runs in a process of its own, forked from one that has imported what tools import.

A new process takes seconds for that. Forks of the tests' own would do without the threads that
libraries have begun in it, and wait for them.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

IMPORTED = ["gnpractical.tv.run", "gnpractical.d2.trainer"]  # where they can be
ROOT = Path(__file__).parents[2]
# An iteration of each trainer; {root} and {out} are to be filled in.
ONE_STEP = {
    "train_torchvision.py": (
        "--quick --min-size 64 --device cpu --iterations 1 --output-dir {out}"
    ),
    "train_net.py": (
        "--config-file {root}/configs/quick/pfpn_gnp_shapes.yaml MODEL.FPN.OUT_CHANNELS 16 "
        "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 "
        "SOLVER.MAX_ITER 1 DATALOADER.NUM_WORKERS 0 OUTPUT_DIR {out}"
    ),
}


def forked(tool, words, data, folder):
    """Return a tool's exit code, which is a negative signal where it hangs, and what it prints."""
    printed = folder / "printed.txt"
    call = (tool, words, data, printed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_call, args=call)
    process.start()
    process.join(10)
    process.kill()
    process.join()
    return process.exitcode, printed.read_text()


def _call(tool, words, data, printed):
    torch.set_num_threads(1)
    with open(printed, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ["DETECTRON2_DATASETS"] = str(data)
    os.chdir(printed.parent)
    if "detectron2" in sys.modules:
        from detectron2.data import DatasetCatalog, MetadataCatalog

        from gnpractical.d2.datasets import register_shapes

        for split in ("train", "val"):
            DatasetCatalog.remove(f"gnp_shapes_{split}")
            MetadataCatalog.remove(f"gnp_shapes_{split}")
        register_shapes(str(data))
    sys.argv = [tool, *words]
    runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
