"""Files that are refused, or taken for something else than they seem."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="torchvision is not installed")
from helpers.resnet_files import SMALL, randomized, small, write
from torchvision.models import resnet18, resnet50, resnext50_32x4d

from gnpractical.runs.group_record import GroupMismatch
from gnpractical.tv import fasterrcnn_resnet_fpn
from gnpractical.tv.checkpoint import TorchvisionCheckpointer


def test_other_depths_and_structures_in_one_line(tmp_path):
    model = small(norm="BN")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    half = dict(list(resnet18().state_dict().items())[:60])
    preactivation = {
        "stem.conv.weight": torch.zeros(1),
        "stages.0.blocks.0.norm1.weight": half["bn1.weight"],
    }
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html></html>")
    cases = {
        write(
            tmp_path / "50.pth", randomized(resnet50()).state_dict()
        ): "ResNet-50 with BatchNorm, .*--depth 50",
        write(tmp_path / "x.pth", resnext50_32x4d().state_dict()): "ResNeXt-50 32x4d",
        write(tmp_path / "half.pth", half): "missing in the file, first",
        write(tmp_path / "pre.pth", preactivation): "pre-activation ResNet",
        write(tmp_path / "fc.pth", {"fc.weight": torch.zeros(2, 2)}): "holds no ResNet",
        str(page): "no checkpoint that can be loaded",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            TorchvisionCheckpointer(model).load_backbone(path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", ["BN", "GN_PRACTICAL"])
@pytest.mark.parametrize("lost", ["layer1.0.bn1.running_var", "bn1.running_var", "running_mean"])
def test_batch_norms_without_their_statistics(tmp_path, norm, lost):
    weights = {k: v for k, v in randomized(resnet18()).state_dict().items() if not k.endswith(lost)}
    path = write(tmp_path / "18.pth", weights)
    with pytest.raises(ValueError, match="BatchNorms lack .* of their statistics, first .*running"):
        TorchvisionCheckpointer(small(norm=norm), match=True).load_backbone(path)


def test_other_strides_and_classes(tmp_path):
    def model(**kwargs):
        return fasterrcnn_resnet_fpn(depth=50, stages=2, **SMALL, **kwargs)

    cats, dogs = {"things": {1: "cat", 2: "cow"}}, {"things": {5: "cat", 9: "dog"}}
    TorchvisionCheckpointer(model(), str(tmp_path), classes=cats).save("a", iteration=3)
    path = str(tmp_path / "a.pth")
    with pytest.raises(GroupMismatch, match=r"a.pth .*other strides. .*--stride-in-1x1 left out"):
        TorchvisionCheckpointer(model(stride_in_1x1=True)).load(path)
    with pytest.raises(GroupMismatch, match="number 1 of its things is 'cow', and 'dog' in the da"):
        TorchvisionCheckpointer(model(), classes=dogs).load_all(path)
    TorchvisionCheckpointer(model(), classes=dogs).load(path, checkpointables=[])  # fine-tuning
    assert TorchvisionCheckpointer(model(), classes=cats).load_all(path)["iteration"] == 3


def test_files_of_mostly_other_tensors(tmp_path):
    model = small()
    own = dict(list(model.state_dict().items())[-2:])
    path = write(tmp_path / "other.pth", own | {f"other.{i}": torch.ones(2) for i in range(3)})
    with pytest.raises(GroupMismatch, match="other.pth: only 2 of its 5 tensors are of this model"):
        TorchvisionCheckpointer(model).load(path, checkpointables=[])
    TorchvisionCheckpointer(model, mismatch="warn").load(path, checkpointables=[])
    more = write(tmp_path / "more.pth", own | {"other": torch.ones(2)})
    TorchvisionCheckpointer(model).load(more, checkpointables=[])


@pytest.mark.parametrize("content", [b"\xff\x00", b"", b"\n"])
def test_a_last_checkpoint_that_names_no_file(tmp_path, content):
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="last_checkpoint does not hold the name of a file"):
        TorchvisionCheckpointer(small(), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}, "'conv1.weight' .* not finite"),
        ({"bn1.running_var": -torch.ones(64)}, "'bn1.running_var' holds variances below zero"),
        ({"bn1.weight": torch.ones(64, dtype=torch.int64)}, "'bn1.weight' holds torch.int64"),
        ({"bn1.bias": torch.ones(64) + 1j}, "'bn1.bias' holds torch.complex64"),
        ({"bn1.bias": torch.ones(64).to_sparse()}, "'bn1.bias' is sparse"),
        ({"bn1.bias": [0.0] * 64}, "'bn1.bias' is no tensor but a list"),
        ({3: torch.ones(64)}, "holds no tensors by name"),
        ({"module.layer1.0.conv1.weight": torch.ones(1)}, "several ResNets: 'layer1.0.conv1.wei"),
    ],
)
def test_tensors_that_no_model_can_have(tmp_path, changed, message):
    model = small(norm="BN")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / "18.pth"
    torch.save(randomized(resnet18()).state_dict() | changed, path)
    with pytest.raises(ValueError, match=message):
        TorchvisionCheckpointer(model).load_backbone(str(path))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_prefixes_of_wrappers_and_heads_of_other_detectors(tmp_path):
    model = small(norm="GN_1")
    TorchvisionCheckpointer(model, str(tmp_path)).save("own")
    saved = torch.load(tmp_path / "own.pth")["model"]
    torch.save(
        {"model": {f"module._orig_mod.{k}": v for k, v in saved.items()}}, tmp_path / "w.pth"
    )
    other = small(norm="GN_1")
    TorchvisionCheckpointer(other).load(str(tmp_path / "w.pth"), checkpointables=[])
    torch.testing.assert_close(other.state_dict(), saved)

    names = {k.replace("backbone.body.", "net.backbone."): v for k, v in saved.items()}
    whole = {k.removeprefix("net."): v for k, v in names.items()}
    torch.save({"state_dict": whole}, tmp_path / "mmdet.pth")
    with pytest.raises(GroupMismatch, match="whole detector .* left out, first"):
        TorchvisionCheckpointer(other).load(str(tmp_path / "mmdet.pth"), checkpointables=[])


def test_a_count_that_is_assumed_is_said_to_be(tmp_path):
    source = resnet18(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    torch.save(source.state_dict(), tmp_path / "18.pth")
    with pytest.raises(GroupMismatch, match="G=32 .assumed, since the file does not say."):
        TorchvisionCheckpointer(small(norm="GN_1")).load_backbone(str(tmp_path / "18.pth"))


def test_norms_yet_to_be_calibrated_are_other_norms_than_the_files(tmp_path):
    torch.save(randomized(resnet18()).state_dict(), tmp_path / "18.pth")
    model = small(norm="GN_MEASURED")
    with pytest.raises(GroupMismatch, match="BatchNorm2d in the file, GN_MEASURED in the model"):
        TorchvisionCheckpointer(model).load_backbone(str(tmp_path / "18.pth"))
    checkpointer = TorchvisionCheckpointer(model, match=True)
    checkpointer.load_backbone(str(tmp_path / "18.pth"))
    assert len(checkpointer.other_norms.record) == 20


def test_a_flipped_byte_is_found(tmp_path):
    model = small(norm="GN_1")
    TorchvisionCheckpointer(model, str(tmp_path)).save("own")
    path = tmp_path / "own.pth"
    content = bytearray(path.read_bytes())
    weight = model.roi_heads.box_head[-2].weight.detach().numpy().tobytes()[:64]
    content[content.find(weight) + 10] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="own.pth is no checkpoint that can be loaded.*checksum"):
        TorchvisionCheckpointer(model).load(str(path))
