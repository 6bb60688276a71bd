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
from pathlib import Path

from gnpractical.layers.plain_norms import OneGroupNorm, to_group_norm
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.export import STRIDE, export_backbone, export_detector
from gnpractical.runs.output_dir import check_output_dir
from gnpractical.runs.saved_run import find_run


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
    opset = "of ONNX, for a backbone; from 21 on it has GroupNormalization"
    add("--opset", type=int, metavar="N", help=opset)
    return parser.parse_args()


def check(args):
    if args.output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output must end in .onnx or .pt2, got {str(args.output)!r}")
    if any(side < 2 * STRIDE or side % STRIDE for side in args.size):
        raise ValueError(f"--size must be multiples of {STRIDE} from {2 * STRIDE}, got {args.size}")
    if args.part == "model" and args.output.suffix == ".pt2":
        raise ValueError(
            "--part model: torch.export does not take non-maximum suppression. Write the whole "
            "model as .onnx, or --part backbone as .pt2"
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
    written_out = sum(isinstance(module, OneGroupNorm) for module in model.modules())
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        part = Path(folder, args.output.name)  # in its place only once it is checked
        if args.part == "backbone":
            exported = export_backbone(model.backbone, part, args.size, args.opset)
        else:
            exported = export_detector(saved_model.detector(model), part, args.size)
        part.replace(args.output)
    agreement = "not checked, since onnxruntime is not installed"
    if exported.difference is not None:
        agreement = (
            f"differs from the model by {exported.difference:.1e} at most, which differs by "
            f"{exported.sensitivity:.1e} when the last digit of its input changes"
        )
    print(
        f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, {agreement}. "
        f"{', '.join(exported.inputs)} -> {', '.join(exported.outputs)}. "
        f"{written_out} norms of one group are written out, {exported.layer_norms} of "
        f"{exported.nodes['GroupNormalization']} GroupNormalization nodes have one group"
    )


if __name__ == "__main__":
    with in_one_line():
        main()
