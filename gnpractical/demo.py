"""Train the small Panoptic FPN of configs/quick on the embedded shapes, in minutes.

    python -m gnpractical.demo [--output-dir output/demo] [--iterations 1000]

With Detectron2 where it can be imported, else with torchvision. Leaves the group counts, the
scores and a picture of predictions in the output folder, and says where.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from gnpractical.runs.errors import in_one_line
from gnpractical.runs.output_dir import check_output_dir, claim_output_dir


def configs_folder() -> Path:
    """Where the configs are: inside an installed package, beside it in the repository."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def train_with_detectron2(args: argparse.Namespace) -> None:
    """As ``tools/train_net.py --config-file configs/quick/pfpn_gnp_shapes.yaml``."""
    from detectron2.engine import default_setup

    from gnpractical.d2 import load_config
    from gnpractical.d2.trainer import Trainer, adapt_to_device

    opts = ["OUTPUT_DIR", args.output_dir]
    opts += ["SOLVER.MAX_ITER", args.iterations] if args.iterations else []
    cfg = load_config(str(configs_folder() / "quick" / "pfpn_gnp_shapes.yaml"), opts)
    adapt_to_device(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    Trainer(cfg).train()  # ends with an evaluation, whose scores the trainer logs


def train_with_torchvision(args: argparse.Namespace) -> None:
    """As ``tools/train_torchvision.py --quick``."""
    from gnpractical.tv import quick
    from gnpractical.tv.run import RunOptions, run

    options = quick.OPTIONS | ({"iterations": args.iterations} if args.iterations else {})
    run(RunOptions(output_dir=args.output_dir, quick=True, **options))


def _can_import(*modules: str) -> bool:
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", default="output/demo", metavar="DIR")
    parser.add_argument("--iterations", type=int, metavar="N", help="steps of training")
    args = parser.parse_args()
    with in_one_line():
        if args.iterations is not None and args.iterations < 1:
            raise ValueError(f"--iterations must be at least 1, got {args.iterations}")
        check_output_dir(args.output_dir, "--output-dir")
        claim_output_dir(args.output_dir, "--output-dir")
        if _can_import("detectron2.engine"):
            print("Training a small Panoptic FPN with Detectron2.", flush=True)
            train_with_detectron2(args)
        elif _can_import("torchvision", "torch.utils.tensorboard"):
            print(
                "Detectron2 cannot be imported: training a small Panoptic FPN with torchvision.",
                flush=True,
            )
            train_with_torchvision(args)
        else:
            raise ValueError(
                "the demo needs Detectron2, or torchvision and TensorBoard, and neither can be "
                "imported; install the latter two: pip install tensorboard torchvision"
            )


if __name__ == "__main__":
    main()
