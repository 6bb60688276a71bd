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
# Of the largest value of an output, or five times what the last digit of the input makes: deep nets
# of group norms, untrained ones above all, amplify rounding to 1e-4 and more.
MAX_DIFFERENCE = 1e-4

Model = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What is in a file that was written.

    Attributes:
        inputs, outputs: Their names.
        difference: The largest from the model's, as a share of the output's largest value; None
            where there is nothing to run the file with.
        sensitivity: The same of the model's own outputs when its input changes in the last digit.
        nodes: How often each operator occurs; empty for torch.export's files.
        layer_norms: How many ``GroupNormalization`` nodes have one group.
    """

    inputs: list[str]
    outputs: list[str]
    difference: float | None
    sensitivity: float
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
    backbone: nn.Module, path: Path, size: Sequence[int], opset: int | None = None
) -> Exported:
    """Write a backbone, which takes normalized images (N, 3, H, W) and gives a dict of features.

    N is free, and so are H and W in multiples of 32, from 64 on.

    Args:
        path: With the suffix ``.onnx`` or ``.pt2``.
        size: H and W of the example that it is traced with.
        opset: That of ONNX, None for the exporter's own. From 21 on group norms are
            ``GroupNormalization``; below, they are instance norms between two reshapes.

    Raises:
        ValueError: The file gives other features than the model.
    """
    example = torch.randn(2, 3, *size)
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
    other = torch.randn(1, 3, size[0] + STRIDE, size[1])
    if path.suffix == ".pt2":
        exported = torch.export.load(path).module()
        compared = _compared(path, names, exported(other), model, other)
        return Exported(["images"], names, *compared, Counter(), 0)
    return _checked(path, names, other, model)


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


def export_detector(detector: Detector, path: Path, size: Sequence[int]) -> Exported:
    """Write a whole detector as ONNX. H and W are free.

    Args:
        path: With the suffix ``.onnx``.
        size: H and W of the example that it is traced with.

    Raises:
        ValueError: The file predicts something else than the model.
    """
    # Smooth as photographs are: on noise all scores are close, and their order is chance.
    coarse = torch.rand(1, 3, size[0] // STRIDE, size[1] // STRIDE)
    example = detector.white * functional.interpolate(coarse, tuple(size), mode="bilinear")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch.export does not take non-maximum suppression.
        torch.onnx.export(
            detector.model,
            (example,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=list(detector.outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
    return _checked(path, detector.outputs, example, detector.model)


def _checked(path: Path, names: Sequence[str], example: Tensor, model: Model) -> Exported:
    import onnx

    graph = onnx.load(path).graph
    nodes = Counter(node.op_type for node in graph.node)
    layer_norms = sum(
        attribute.name == "num_groups" and attribute.i == 1
        for node in graph.node
        if node.op_type == "GroupNormalization"
        for attribute in node.attribute
    )
    inputs = [value.name for value in graph.input]
    try:
        import onnxruntime
    except ImportError:
        return Exported(inputs, list(names), None, 0.0, nodes, layer_norms)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [torch.as_tensor(o) for o in session.run(list(names), {inputs[0]: example.numpy()})]
    with torch.inference_mode():
        compared = _compared(path, names, outputs, model, example)
    return Exported(inputs, list(names), *compared, nodes, layer_norms)


def _compared(
    path: Path, names: Sequence[str], outputs: Sequence[Tensor], model: Model, example: Tensor
) -> tuple[float, float]:
    """How far the outputs of the file at ``path`` are from the model's, and these from themselves
    when the last digit of the example changes."""
    wanted, changed = model(example), model(example * (1 + 1e-7))
    for name, output, want in zip(names, outputs, wanted, strict=True):
        if output.shape != want.shape:
            shapes = f"{tuple(output.shape)}, not {tuple(want.shape)}"
            raise ValueError(
                f"{path.name}: its output {name!r} has the shape {shapes} of the model"
            )
    difference, sensitivity = _difference(outputs, wanted), _difference(changed, wanted)
    admitted = max(MAX_DIFFERENCE, 5 * sensitivity)
    if not difference <= admitted:
        raise ValueError(
            f"{path.name} would give other values than the model: they differ by {difference:.1e} "
            f"of the largest, {admitted:.1e} is admitted. It was not written"
        )
    return difference, sensitivity


def _difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest, as a share of the output's largest value."""
    return max(
        (
            float((output - want).abs().max() / want.abs().max().clamp(min=1e-12))
            for output, want in zip(outputs, wanted, strict=True)
            if want.numel() and output.shape == want.shape
        ),
        default=0.0,
    )
