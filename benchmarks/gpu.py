#!/usr/bin/env python
"""Test and measure on a GPU all that a CPU cannot show, and write tables of it.

    python benchmarks/gpu.py --output output/gpu [--triton FILE] [--parts tests group_norm ...]

Every part runs in a process of its own and leaves <part>.json in the folder; parts that are there
already are not run again, so that a run that was stopped goes on. report.md has the tables of all.
Without Detectron2 its part is left out. --dry-run does all of it on a CPU with tiny maps and models
and some of the tests.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import group_norm
import steps
import torch
from tabulate import tabulate

from gnpractical.runs.errors import first_line, in_one_line
from gnpractical.runs.output_dir import claim_output_dir, write_text

ROOT = Path(__file__).parents[1]
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}  # by JUnit's words


def run_tests(args, device):
    """A row for each outcome of the tests for GPUs; those that did not pass are named."""
    where = "tests/layers" if args.dry_run else "tests/*"
    files = sorted(str(path) for path in ROOT.glob(f"{where}/test_*_on_gpu.py"))
    written = args.output.resolve() / "tests.xml"
    written.unlink(missing_ok=True)  # an earlier run's, should this one end without any
    command = [sys.executable, "-m", "pytest", *files, "-q", f"--junitxml={written}"]
    environment = os.environ | {"GNPRACTICAL_TEST_DEVICE": device}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    names = defaultdict(list)
    for case in ElementTree.parse(written).iter("testcase"):
        found = [OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES]
        names[found[0] if found else "passed"].append(case.get("name"))
    return [
        {"tests": kind, "count": len(n), "names": ", ".join(n) if kind != "passed" else ""}
        for kind, n in names.items()
    ]


def measure_group_norm(args, device):
    if args.dry_run:
        return group_norm.measure("tiny", device, [torch.float32], 1, 1e-3, args.triton)
    dtypes = [torch.float32, torch.bfloat16]
    return group_norm.measure("large", device, dtypes, 1, 0.01, args.triton)


def measure_steps(args, device, framework):
    norms, size, count = steps.NORMS, steps.LARGE, args.steps
    if args.dry_run:
        norms, size, count = ("GN", "GN_PRACTICAL+WS"), (64, 64), 2
    settings = steps.GPU_SETTINGS[: 2 if framework == "detectron2" else 3]  # time is short
    options = {"settings": settings, "small": args.dry_run}
    return [
        row
        for kind in steps.KINDS[: 1 if args.dry_run else 2]
        for row in steps.measure(framework, kind, norms, size, device, count, **options)
    ]


PARTS = {
    "tests": run_tests,
    "group_norm": measure_group_norm,
    "torchvision": partial(measure_steps, framework="torchvision"),
    "detectron2": partial(measure_steps, framework="detectron2"),
}
FLOATS = {"tests": ".0f", "group_norm": group_norm.FLOATS}  # of a table's columns


def versions(device):
    """The hardware, and the versions of what was measured with."""
    names = ("torch", "torchvision", "detectron2", "triton")
    found = {"device": "CPU"}
    if device == "cuda":
        found = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | {n: importlib.metadata.version(n) for n in names if find_spec(n)}


def run_part(name, args, device):
    start = time.perf_counter()
    rows = PARTS[name](args, device)
    seconds = round(time.perf_counter() - start)
    record = {"dry_run": args.dry_run, "versions": versions(device), "seconds": seconds}
    record["rows"] = rows
    write_text(args.output / f"{name}.json", json.dumps(record, indent=1))


def has_failures(output):
    rows = json.loads((output / "tests.json").read_text())["rows"]
    return any(row["tests"] == "failed" for row in rows)


def report(output):
    """The tables of all parts in the folder, in Markdown."""
    texts = []
    for name in PARTS:
        path = output / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            about = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
            floats = FLOATS.get(name, steps.FLOATS)
            table = tabulate(record["rows"], "keys", tablefmt="github", floatfmt=floats)
            texts.append(f"## {name}\n\n{about}; {record['seconds']} s\n\n{table}\n")
    return "\n".join(texts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="DIR")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--steps", type=int, default=10, help="of each model")
    add("--triton", metavar="FILE", help="kernels to measure, too; see group_norm.py")
    add("--dry-run", action="store_true", help="on the CPU, tiny")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no GPU; --dry-run does all of it on the CPU, tiny")
    claim_output_dir(args.output, "--output")
    failed = []
    spawn = multiprocessing.get_context("spawn")
    for name in args.parts:
        missing = name == "detectron2" and name not in steps.FRAMEWORKS
        if missing:
            print(f"{name}: left out, Detectron2 is not installed")
        elif (args.output / f"{name}.json").exists():
            print(f"{name}: is there already")
            if json.loads((args.output / f"{name}.json").read_text())["dry_run"] != args.dry_run:
                raise ValueError(
                    f"{args.output} has a {'measurement' if args.dry_run else 'rehearsal'}: take "
                    f"another --output"
                )
        else:
            # Apart, since an error of CUDA's would make all that follows fail.
            with ProcessPoolExecutor(1, spawn) as process:
                try:
                    process.submit(run_part, name, args, device).result()
                    print(f"{name}: done", flush=True)
                    if name == "tests" and has_failures(args.output):
                        failed.append("tests (tests.json names them; delete it to run them again)")
                except Exception as e:
                    failed.append(f"{name} ({type(e).__name__}: {first_line(e)})")
        text = report(args.output)
        write_text(args.output / "report.md", text)
    print(text)
    if failed:
        raise ValueError(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    with in_one_line():
        main()
