#!/usr/bin/env python
"""Write a trained model as ONNX or torch.export's file, checked against the model.

    python tools/export.py --weights output/mine --output backbone.onnx
    python tools/export.py --weights output/mine --part model --output detector.onnx

What the model is, is read from the run's folder. Weight standardization is folded into the weights,
and group norms of one group are written out in elementary operations, which TensorRT would take for
instance norms. The backbone, with its FPN, takes normalized images (N, 3, H, W), with H and W in
multiples of 32. A whole model takes one image (3, H, W): of torchvision RGB in 0..1, of Detectron2
in INPUT.FORMAT in 0..255 and resized.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gnpractical.layers.plain_norms import OneGroupNorm, to_group_norm
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.export import STRIDE, TOLERANCE, export_backbone, export_detector
from gnpractical.runs.output_dir import check_output_dir
from gnpractical.runs.saved_run import find_run

LEAST_OPSET = 18  # of PyTorch's exporter


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="PATH", help="a run's folder, or a checkpoint in it")
    add("--output", required=True, type=Path, metavar="FILE", help="*.onnx or *.pt2")
    add("--part", choices=["backbone", "model"], default="backbone", help="default: backbone")
    size = "of the example that is traced (256 320); others may be given to the file"
    add("--size", nargs=2, type=int, default=[256, 320], metavar=("H", "W"), help=size)
    keep = "leave group norms of one group as they are, for other programs than TensorRT"
    add("--keep-layer-norm", action="store_true", help=keep)
    opset = f"of ONNX, for a backbone, from {LEAST_OPSET} on; from 21 on with GroupNormalization"
    add("--opset", type=int, metavar="N", help=opset)
    tolerance = f"how far the file's outputs may be from the model's, of the largest ({TOLERANCE})"
    add("--tolerance", type=float, default=TOLERANCE, metavar="X", help=tolerance)
    return parser.parse_args()


def check(args):
    if args.output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output must end in .onnx or .pt2, got {str(args.output)!r}")
    if args.output.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is a folder; a file is written")
    if any(side < 2 * STRIDE or side % STRIDE for side in args.size):
        raise ValueError(f"--size must be multiples of {STRIDE} from {2 * STRIDE}, got {args.size}")
    if args.part == "model" and args.output.suffix == ".pt2":
        raise ValueError(
            "--part model: torch.export does not take non-maximum suppression. Write the whole "
            "model as .onnx, or --part backbone as .pt2"
        )
    if args.opset is not None and (args.part == "model" or args.output.suffix == ".pt2"):
        raise ValueError("--opset is for backbones as .onnx; leave it out")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance must be a positive number, got {args.tolerance}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if args.output.suffix == ".onnx" and missing:
        raise ValueError(
            f"to write {args.output} takes the package {' and '.join(missing)}, not installed "
            f"here: pip install onnx onnxscript onnxruntime, or write a .pt2"
        )
    if args.opset is not None:
        from onnx.defs import onnx_opset_version

        if not LEAST_OPSET <= args.opset <= onnx_opset_version():
            raise ValueError(
                f"--opset must be from {LEAST_OPSET} to {onnx_opset_version()}, got {args.opset}"
            )
    check_output_dir(str(args.output.parent), "--output")


def main():
    args = parse_args()
    run = find_run(args.weights)
    check(args)
    if run.of_detectron2:
        from gnpractical.d2 import saved_model
    else:
        from gnpractical.tv import saved_model
    model, *_ = saved_model.load_model(run, "cpu")
    to_group_norm(model.requires_grad_(False), decompose_layer_norm=not args.keep_layer_norm)
    part_of_it = model.backbone if args.part == "backbone" else model
    written_out = sum(isinstance(module, OneGroupNorm) for module in part_of_it.modules())
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        part = Path(folder, args.output.name)  # in its place only once it is checked
        if args.part == "backbone":
            exported = export_backbone(model.backbone, part, args.size, args.opset, args.tolerance)
        else:
            exported = export_detector(saved_model.detector(model), part, args.size, args.tolerance)
        if exported.layer_norms and not args.keep_layer_norm:
            raise ValueError(
                f"{args.output} was not written: {exported.layer_norms} GroupNormalization nodes "
                f"have one group, of norms that to_group_norm does not know. --opset 20 writes "
                f"none, --keep-layer-norm leaves them"
            )
        part.replace(args.output)
    report(args, exported, written_out)


def report(args, exported, written_out):
    agreement = "not checked, since onnxruntime is not installed"
    if exported.difference is not None:
        agreement = f"differs from the model by {exported.difference:.1e} of the largest value"
    if exported.empty:
        found = ", ".join(exported.empty)
        agreement = f"not compared in {found}, of which the example has none; the rest agrees"
    nodes = ""
    if exported.opset is not None:
        nodes = (
            f". Opset {exported.opset}, {exported.nodes['GroupNormalization']} GroupNormalization "
            f"nodes, {exported.layer_norms} of one group"
        )
    print(
        f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, {agreement}. "
        f"{', '.join(exported.inputs)} -> {', '.join(exported.outputs)}{nodes}. "
        f"{written_out} norms of one group are written out"
    )


if __name__ == "__main__":
    with in_one_line():
        main()
