"""Models as files for other programs, ONNX or torch.export's, each checked against the model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 32  # heights and widths of a backbone's input are multiples of it
# Of the largest value of an output. A single wrong norm in a ResNet-50 FPN makes 0.26 and more,
# rounding 1e-6 to 2e-4.
TOLERANCE = 1e-4
MAX_FLIPS = 1e-3  # the share of an output's integers, such as pixels whose best two classes tie

Model = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What is in a file that was written.

    Attributes:
        inputs, outputs: Their names.
        difference: The largest from the model's, as a share of the output's largest value; None
            where there is nothing to run the file with.
        empty: Those of the outputs that had no values to compare.
        opset: That of ONNX; None for torch.export's files.
        nodes: How often each operator occurs; empty for torch.export's files.
        layer_norms: How many ``GroupNormalization`` nodes have one group.
    """

    inputs: list[str]
    outputs: list[str]
    difference: float | None
    empty: list[str]
    opset: int | None
    nodes: Counter[str]
    layer_norms: int


class _Tuple(nn.Module):
    """A model whose outputs are a tuple in place of a dict, which has no order in a file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images).values())


def export_backbone(
    backbone: nn.Module,
    path: Path,
    size: Sequence[int],
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a backbone, which takes normalized images (N, 3, H, W) and gives a dict of features.

    N is free, and so are H and W in multiples of 32, from 64 on.

    Args:
        path: With the suffix ``.onnx`` or ``.pt2``.
        size: H and W of the example that it is traced with.
        opset: That of ONNX, None for the exporter's own. From 21 on group norms are
            ``GroupNormalization``; below, they are instance norms between two reshapes.
        tolerance: How far the file's features may be from the model's, as a share of the largest.

    Raises:
        ValueError: The file gives other features than the model.
    """
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 3, *size, generator=generator)
    with torch.inference_mode():
        names = list(backbone(example))
    model = _Tuple(backbone).eval()
    # torch.export treats maps of a single row as a case of their own.
    rows, columns = (torch.export.Dim(name, min=2) for name in ("rows", "columns"))
    shapes = ({0: torch.export.Dim("n", min=1), 2: STRIDE * rows, 3: STRIDE * columns},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            torch.export.save(program, path)
        else:
            options: dict[str, Any] = {"opset_version": opset, "output_names": names}
            options |= {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(program, f=path, **options)
    other = torch.randn(1, 3, size[0] + STRIDE, size[1], generator=generator)
    if path.suffix == ".pt2":
        exported = torch.export.load(path).module()
        wanted = model(other)
        difference = _difference(path, names, exported(other), wanted, tolerance)
        return Exported(["images"], names, difference, _empty(names, wanted), None, Counter(), 0)
    return _checked(path, names, other, model, tolerance)


@dataclass(frozen=True)
class Detector:
    """A whole detector as it is written.

    Attributes:
        model: Takes one image (3, H, W) and gives a tuple.
        outputs: What is in the tuple.
        white: The largest value that a pixel may have.
    """

    model: nn.Module
    outputs: Sequence[str]
    white: float


def export_detector(
    detector: Detector, path: Path, size: Sequence[int], tolerance: float = TOLERANCE
) -> Exported:
    """Write a whole detector as ONNX. H and W are free.

    Args:
        path: With the suffix ``.onnx``.
        size: H and W of the example that it is traced with; it is checked on another, (W, H).
        tolerance: How far the file's results may be from the model's, as a share of the largest.

    Raises:
        ValueError: The file predicts something else than the model.
    """
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Tensor:
        # Smooth as photographs are: on noise all scores are close, and their order is chance.
        coarse = torch.rand(1, 3, height // STRIDE, width // STRIDE, generator=generator)
        smooth = functional.interpolate(coarse, (height, width), mode="bilinear")
        return detector.white * smooth[0]

    height, width = size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch.export does not take non-maximum suppression.
        torch.onnx.export(
            detector.model,
            (image(height, width),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=list(detector.outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
    # Not the traced image, whose sizes and counts a trace may have taken for constants.
    return _checked(path, detector.outputs, image(width, height), detector.model, tolerance)


def _checked(
    path: Path, names: Sequence[str], example: Tensor, model: Model, tolerance: float
) -> Exported:
    import onnx

    proto = onnx.load(path)
    graph = proto.graph
    nodes = Counter(node.op_type for node in graph.node)
    layer_norms = sum(
        attribute.name == "num_groups" and attribute.i == 1
        for node in graph.node
        if node.op_type == "GroupNormalization"
        for attribute in node.attribute
    )
    (opset,) = (entry.version for entry in proto.opset_import if not entry.domain)
    inputs, outputs = [value.name for value in graph.input], list(names)
    try:
        import onnxruntime
    except ImportError:
        return Exported(inputs, outputs, None, [], opset, nodes, layer_norms)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = [torch.as_tensor(o) for o in session.run(outputs, {inputs[0]: example.numpy()})]
    with torch.inference_mode():
        wanted = model(example)
    difference = _difference(path, names, results, wanted, tolerance)
    return Exported(inputs, outputs, difference, _empty(names, wanted), opset, nodes, layer_norms)


def _empty(names: Sequence[str], outputs: Sequence[Tensor]) -> list[str]:
    return [name for name, output in zip(names, outputs, strict=True) if not output.numel()]


def _difference(
    path: Path,
    names: Sequence[str],
    outputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    tolerance: float,
) -> float:
    """How far the outputs of the file at ``path`` are from those of the model.

    Raises:
        ValueError: They have other shapes, or are further than they may be.
    """
    largest = 0.0
    for name, output, want in zip(names, outputs, wanted, strict=True):
        if output.shape != want.shape:
            raise ValueError(
                f"{path.name} was not written: its output {name!r} has the shape "
                f"{tuple(output.shape)}, the model's {tuple(want.shape)}"
            )
        if not want.numel():
            continue
        if want.is_floating_point():
            unit, admitted = "of the largest value", tolerance
            difference = float((output - want).abs().max() / want.abs().max().clamp(min=1e-12))
            largest = max(largest, difference)
        else:
            unit, admitted = "of the integers", MAX_FLIPS
            difference = float((output != want).float().mean())
        if not difference <= admitted:  # nan is not
            raise ValueError(
                f"{path.name} was not written: its output {name!r} differs from the model's by "
                f"{difference:.1e} {unit}, where {admitted:.1e} is admitted. Rounding makes a "
                f"few 1e-4 in deep nets, for which there is --tolerance; a wrong norm makes 0.1"
            )
    return largest
