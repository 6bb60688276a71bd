"""MODEL.GNP.MATCH_BATCHES in a run."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from torchvision.models import resnet18, resnet50

from gnpractical.d2 import load_config
from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.trainer import Trainer
from gnpractical.runs.group_record import RECORD_KEY, GroupMismatch

CONFIGS = Path(__file__).parents[2] / "configs"
RGB = ["MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]


@pytest.fixture
def weights(tmp_path):
    """A ResNet-18 with BatchNorms that have statistics."""
    torch.manual_seed(0)
    model = resnet18()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    path = tmp_path / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def trained(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def groups_of(cfg):
    return {r["name"]: r for r in json.loads((Path(cfg.OUTPUT_DIR) / "groups.json").read_text())}


@pytest.mark.slow
def test_batch_norms_weights_are_matched_once_and_recorded(tiny_cfg, weights, monkeypatch):
    options = ["MODEL.WEIGHTS", weights, *RGB, "DATASETS.TEST", "()"]
    cfg = tiny_cfg(*options, "MODEL.GNP.MATCH_BATCHES", 2)
    trained(cfg)
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "ResNet-18 with BatchNorm" in log
    assert "Matched 15 of 15 GroupNorms that begin with the weights of other norms" in log
    matched = {name for name, row in groups_of(cfg).items() if row["matched_from"]}
    assert len(matched) == 15 and all(name.startswith("backbone.bottom_up.") for name in matched)
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    name = "backbone.bottom_up.stem.conv1.norm"
    assert saved[RECORD_KEY][name]["matched_from"] == "BatchNorm2d"

    # Neither a resumed run nor evaluation matches, and the record stays.
    monkeypatch.setattr("gnpractical.d2.trainer.match_loaded", None)
    cfg = tiny_cfg(*options, "MODEL.GNP.MATCH_BATCHES", 2, "SOLVER.MAX_ITER", 4)
    trained(cfg, resume=True)
    assert groups_of(cfg)[name]["matched_from"] == "BatchNorm2d"


def test_without_matching_it_is_an_error_that_names_the_key(tiny_cfg, weights):
    trainer = Trainer(tiny_cfg("MODEL.WEIGHTS", weights, *RGB))
    message = "MODEL.RESNETS.NORM BN.*MODEL.GNP.MATCH_BATCHES 2.*CHECKPOINT_MISMATCH warn"
    with pytest.raises(GroupMismatch, match=message):
        trainer.resume_or_load(resume=False)


def test_other_images_are_an_error_that_names_the_keys(tiny_cfg, weights):
    cfg = tiny_cfg("MODEL.WEIGHTS", weights, "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [0, 0, 0])
    message = r"INPUT.FORMAT RGB, MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"
    with pytest.raises(GroupMismatch, match=message):
        GNPCheckpointer(Trainer.build_model(cfg)).load(weights, checkpointables=[])


def test_another_depth_is_an_error_that_names_the_key(tiny_cfg, weights):
    cfg = load_config(f"{CONFIGS}/pfpn_gnp_full_pretrained.yaml", ["MODEL.DEVICE", "cpu"])
    with pytest.raises(
        ValueError, match="ResNet-18 with BatchNorm.* Choose MODEL.RESNETS.DEPTH 18"
    ):
        GNPCheckpointer(Trainer.build_model(cfg)).load(weights)


@pytest.mark.parametrize("name", ["faster_rcnn_gn32_ws", "pfpn_gnp_full"])
def test_the_pretrained_configs_fit_torchvisions_weights(tmp_path, name):
    model = resnet50()
    model.bn1.running_mean.fill_(1)
    torch.save(model.state_dict(), tmp_path / "r50.pth")
    cfg = load_config(f"{CONFIGS}/{name}_pretrained.yaml", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.GNP.MATCH_BATCHES == 2
    checkpointer = GNPCheckpointer(Trainer.build_model(cfg), match=True)
    checkpointer.load(str(tmp_path / "r50.pth"), checkpointables=[])
    assert len(checkpointer.other_norms.record) == 53 and checkpointer.other_norms.tell_their_output


def test_the_jhu_config_fits_jhus_weights(tmp_path):
    state = resnet50(norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)).state_dict()
    state = {k: v - v.mean((1, 2, 3), True) if v.dim() == 4 else v for k, v in state.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ws.pth")
    cfg = load_config(f"{CONFIGS}/faster_rcnn_gnp_ws_jhu.yaml", ["MODEL.DEVICE", "cpu"])
    checkpointer = GNPCheckpointer(Trainer.build_model(cfg))
    checkpointer.load(str(tmp_path / "ws.pth"), checkpointables=[])
    assert not checkpointer.other_norms.record


def test_more_batches_than_images(tiny_cfg, weights):
    trainer = Trainer(tiny_cfg("MODEL.WEIGHTS", weights, *RGB, "MODEL.GNP.MATCH_BATCHES", 50))
    trainer.resume_or_load(resume=False)
    with pytest.raises(ValueError, match="MATCH_BATCHES 50 of .* 2 are more than the 8 training"):
        trainer.train()
