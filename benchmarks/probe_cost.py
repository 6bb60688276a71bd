#!/usr/bin/env python
"""What one measurement of the gradient's variance costs, in training steps of the small model.

    python benchmarks/probe_cost.py [--steps 20]

Steps and measurements in turn, in one run; MODEL.GNP.PROBE_PERIOD makes one such measurement each
period.
"""

import argparse
import statistics
import tempfile
import time

from detectron2.utils.events import EventStorage

from gnpractical import measure_gradient_variance
from gnpractical.d2 import load_config
from gnpractical.d2.trainer import Trainer, adapt_to_device


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as output, EventStorage():
        cfg = load_config("configs/quick/pfpn_gnp_shapes.yaml", ["OUTPUT_DIR", output])
        adapt_to_device(cfg)
        trainer = Trainer(cfg)
        batches = trainer.extra_batches(1)
        steps, probes = [], []
        for _ in range(args.steps + 4):
            start = time.perf_counter()
            trainer._trainer.iter = 0
            trainer._trainer.run_step()
            middle = time.perf_counter()
            measure_gradient_variance(trainer.model, batches)
            steps.append(middle - start)
            probes.append(time.perf_counter() - middle)
    step, probe = statistics.median(steps[4:]), statistics.median(probes[4:])
    print(f"step {step:.3f} s, measurement {probe:.3f} s: {probe / step:.2f}% at period 100")


if __name__ == "__main__":
    main()
