"""Models of both trainers as files, run outside of this package."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.forked_tool import forked

from gnpractical.runs.export import (
    Detector,
    Exported,
    _difference,
    export_backbone,
    export_detector,
)
from gnpractical.runs.saved_run import find_run

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
        reason="the ONNX exporter of torch below 2.5 does not go with onnxscript of today",
    ),
]


@pytest.fixture
def export(places, tmp_path):
    """A function (weights, file, options) -> exit code and what is printed."""

    def run(weights, output, *options):
        words = ["--weights", weights, "--output", output, *options]
        return forked("export.py", list(map(str, words)), places["data"], tmp_path)

    return run


def saved_model(folder):
    """The module for a run's framework, and its model with this package's norms."""
    run = find_run(str(folder))
    if run.of_detectron2:
        from gnpractical.d2 import saved_model
    else:
        from gnpractical.tv import saved_model
    return saved_model, saved_model.load_model(run, "cpu")[0].requires_grad_(False)


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(outputs, wanted):
    for output, want in zip(outputs, wanted, strict=True):
        scale = float(want.abs().max()) if want.numel() else 1.0
        output = torch.as_tensor(output)
        torch.testing.assert_close(output, want, rtol=0, atol=1e-4 * scale)


def layer_norms(path):
    """How many GroupNormalization nodes there are, and how many of one group."""
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "GroupNormalization"]
    attributes = [a for node in nodes for a in node.attribute if a.name == "num_groups"]
    return len(nodes), sum(a.i == 1 for a in attributes)


def test_backbones(run_folder, export, tmp_path):
    _, model = saved_model(run_folder)
    images = torch.randn(3, 3, 96, 160)
    wanted = model.backbone(images)
    for name, options in {
        "plain.onnx": (),
        "new.onnx": ("--opset", 21),
        "kept.onnx": ("--opset", 21, "--keep-layer-norm"),
        "file.pt2": ("--size", 64, 64),
    }.items():
        path = tmp_path / name
        code, text = export(run_folder, path, *options)
        assert code == 0, text
        assert f"{path}: " in text and "differs from the model by" in text
        assert f"-> {', '.join(wanted)}. " in text
        if path.suffix == ".onnx":
            nodes, one = layer_norms(path)
            assert f"{nodes} GroupNormalization nodes, {one} of one group" in text
            outputs = session(path).run(list(wanted), {"images": images.numpy()})
        else:
            outputs = torch.export.load(path).module()(images)
        close(outputs, wanted.values())
    assert layer_norms(tmp_path / "plain.onnx") == (0, 0)
    some, none = layer_norms(tmp_path / "new.onnx")
    both, one = layer_norms(tmp_path / "kept.onnx")
    assert some > 0 and none == 0 and one > 0 and both == some + one
    assert {p.suffix for p in tmp_path.iterdir()} <= {".onnx", ".pt2", ".txt"}


def test_whole_models(run_folder, export, tmp_path):
    folder = run_folder
    if find_run(str(run_folder)).of_detectron2:
        code, text = export(run_folder, tmp_path / "model.onnx", "--part", "model")
        assert code == 1 and "only GeneralizedRCNN can be written whole, not PanopticFPN" in text
        folder = tmp_path / "without_branch"
        shutil.copytree(run_folder, folder)
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace(": PanopticFPN", ": GeneralizedRCNN"))
    path = tmp_path / "model.onnx"
    code, text = export(folder, path, "--part", "model", "--size", 64, 96)
    assert code == 0, text
    written = path.read_bytes()
    code, text = export(folder, path, "--part", "model", "--size", 64, 96, "--tolerance", 1e-12)
    assert code == 1 and "error: model.onnx was not written: its output" in text
    assert path.read_bytes() == written
    module, model = saved_model(folder)
    detector = module.detector(model)
    for size in ((64, 96), (96, 96), (96, 64)):
        coarse = torch.rand(1, 3, 2, 3, generator=torch.Generator().manual_seed(1))
        image = detector.white * torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]
        wanted = detector.model(image)
        close(session(path).run(list(detector.outputs), {"image": image.numpy()}), wanted)
        assert len(wanted[0]) > 0


def test_bad_input(run_folder, export, tmp_path):
    path = tmp_path / "model.onnx"
    (tmp_path / "dir.onnx").mkdir()
    for weights, output, options, expected in [
        (run_folder, tmp_path / "model.trt", (), "--output must end in .onnx or .pt2"),
        (
            run_folder,
            path,
            ("--size", 100, 64),
            "--size must be multiples of 32 from 64, got [100, 64]",
        ),
        (run_folder, path, ("--size", 0, 64), "--size must be multiples of 32"),
        (run_folder, tmp_path / "m.pt2", ("--part", "model"), "Write the whole model as .onnx"),
        (run_folder, tmp_path / "dir.onnx", (), "is a folder; a file is written"),
        (run_folder, path, ("--opset", 17), "--opset must be from 18 to "),
        (run_folder, path, ("--opset", 200), ", got 200"),
        (tmp_path / "gone", path, (), "gone does not exist"),
        (run_folder, run_folder / "model_final.pth" / "m.onnx", (), "--output"),
        (run_folder, tmp_path / "m.pt2", ("--opset", 21), "--opset is for backbones as .onnx"),
        (run_folder, path, ("--tolerance", 0), "--tolerance must be a positive number, got 0.0"),
    ]:
        code, text = export(weights, output, *options)
        line = text.splitlines()[-1]
        assert code == 1 and line.startswith("error: ") and expected in line, text
    assert not path.exists()


def test_nodes_of_one_group_are_an_error(run_folder, error_of, monkeypatch, tmp_path):
    nodes = Counter(GroupNormalization=3)
    found = Exported(["images"], ["p2"], 0.0, [], 21, nodes, layer_norms=2)
    monkeypatch.setattr("gnpractical.runs.export.export_backbone", lambda *_: found)
    words = ("--weights", run_folder, "--output", tmp_path / "m.onnx")
    assert "m.onnx was not written: 2 GroupNormalization nodes" in error_of("export.py", *words)


def test_what_is_no_agreement():
    """``_difference`` of outputs that are the model's but for a bit."""
    boxes, labels = torch.tensor([[0.0, 0.0, 50.0, 100.0]]), torch.arange(2000)

    def difference(boxes_of_file, labels_of_file, tolerance=1e-4):
        outputs = (boxes_of_file, labels_of_file)
        path, names = Path("m.onnx"), ["boxes", "labels"]
        return _difference(path, names, outputs, (boxes, labels), tolerance)

    assert difference(boxes, labels) == 0
    assert difference(boxes + 0.005, labels) == pytest.approx(5e-5, rel=1e-2)
    one, many = labels.clone(), labels.clone()
    one[7] += 1  # a pixel whose best two classes tie
    many[:3] += 1
    assert difference(boxes, one) == 0
    nowhere = boxes.new_full(boxes.shape, torch.nan)
    for wrong, expected in [
        ((boxes + 0.02, labels), "'boxes' differs from the model's by 2.0e-04 of the largest"),
        ((boxes.flip(1), labels), "'boxes' differs from the model's by 1.0e"),
        ((nowhere, labels), "'boxes' differs from the model's by nan"),
        ((boxes[:0], labels), r"'boxes' has the shape \(0, 4\), the model's \(1, 4\)"),
        ((boxes, many), "'labels' differs from the model's by 1.5e-03 of the integers"),
    ]:
        with pytest.raises(ValueError, match=f"m.onnx was not written: its output {expected}"):
            difference(*wrong)
    assert difference(boxes + 0.02, labels, tolerance=1e-3) > 1e-4


def test_what_was_not_compared_is_said(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, image):
            return image[:, :0, 0], image.amax()

    detector = Detector(Nothing(), ["boxes", "white"], 1.0)
    exported = export_detector(detector, tmp_path / "m.onnx", (64, 96))
    assert exported.empty == ["boxes"] and exported.difference < 1e-6 and exported.opset == 17


def test_sizes_of_the_traced_image_do_not_stay(tmp_path):
    class OfOneSize(torch.nn.Module):
        def forward(self, image):
            return (image * int(image.shape[1]),)

    detector = Detector(OfOneSize(), ["pixels"], 1.0)
    with pytest.raises(ValueError, match="its output 'pixels' differs from the model's"):
        export_detector(detector, tmp_path / "m.onnx", (64, 96))


def test_a_file_that_differs_is_an_error(monkeypatch, tmp_path):
    class Backbone(torch.nn.Module):
        def forward(self, images):
            return {"a": images + 1}

    class Other(torch.nn.Module):
        def forward(self, images):
            return (images + 2,)

    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda _, *a, **kw: export(Other(), *a, **kw))
    with pytest.raises(ValueError, match="b.pt2 was not written: its output 'a' differs"):
        export_backbone(Backbone(), tmp_path / "b.pt2", (64, 64))
