"""A converted model, weight standardized or folded, through torch.export and ONNX."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import convert, fold_weight_standardization
from gnpractical.layers import PracticalGroupNorm
from gnpractical.layers.weight_standardization import WSConv2d

pytestmark = pytest.mark.slow


class Bottleneck(nn.Module):
    """One norm with a single group, one with as many as channels, one between."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        a, b = self.bn2(self.conv2(x)), self.bn3(self.conv3(x))
        return F.relu(torch.cat([a, b], dim=1)).mean((2, 3))


def bottleneck():
    model = Bottleneck()
    conversion = convert(
        model, torch.randn(1, 3, 16, 16), rule="practical", weight_standardization=True
    )
    assert [norm.num_groups for norm in conversion.norms] == [1, 8, 8]
    return model


def resnet18():
    models = pytest.importorskip("torchvision").models
    model = models.resnet18(num_classes=4)
    convert(model, torch.randn(1, 3, 64, 64), rule="practical", weight_standardization=True)
    return model


def prepared(build, folded):
    """The model to export, and an unfolded one to compare with."""
    model = build().eval()
    for module in model.modules():  # values that a lost or swapped parameter would change
        if isinstance(module, PracticalGroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    convolutions = sum(isinstance(module, WSConv2d) for module in model.modules())
    assert convolutions
    reference = copy.deepcopy(model)
    if folded:
        assert fold_weight_standardization(model) == convolutions
    return model, reference


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("build", [bottleneck, resnet18])
def test_torch_export(build, folded):
    model, reference = prepared(build, folded)
    x = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for example in (x, x[:1], torch.randn(3, 3, 64, 64)):
            torch.testing.assert_close(exported(example), reference(example), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="the ONNX exporter of torch below 2.5 does not go with onnxscript of today",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("build", [bottleneck, resnet18])
def test_onnx(build, folded, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    model, reference = prepared(build, folded)
    x = torch.randn(2, 3, 64, 64)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_standardization", [False, True])
def test_torch_fx(weight_standardization):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    convert(model, x, rule="practical", weight_standardization=weight_standardization)
    features = create_feature_extractor(model, ["layer2", "fc"])(x)
    assert features["layer2"].shape == (2, 128, 8, 8)
    torch.testing.assert_close(features["fc"], model(x))


def test_scripting_weight_standardization_says_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    convert(model, torch.randn(1, 3, 8, 8), rule="practical", weight_standardization=True)
    with pytest.raises(RuntimeError, match="first call gnpractical.fold_weight_standardization"):
        torch.jit.script(model)
    fold_weight_standardization(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
