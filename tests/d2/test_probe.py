import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.utils.events import EventStorage

from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.norm import group_norm_keys
from gnpractical.d2.trainer import Trainer
from gnpractical.measure.calibration import measured_norms
from gnpractical.runs.calibrate_measured import calibrate_measured
from gnpractical.runs.group_record import GroupMismatch
from gnpractical.runs.output_dir import check_output_dir

MEASURED = [
    word
    for section in ("RESNETS", "FPN", "SEM_SEG_HEAD")
    for word in (f"MODEL.{section}.NORM", "GN_MEASURED")
]


def trained(cfg, resume=False):
    check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def groups_of(cfg):
    with open(f"{cfg.OUTPUT_DIR}/groups.json") as f:
        return {row["name"]: (row["norm"], row["num_groups"]) for row in json.load(f)}


def log_of(cfg):
    return (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()


def counts_of(model):
    return {name: norm.num_groups for name, norm in measured_norms(model).items()}


@pytest.mark.slow
def test_measured_is_calibrated_once_and_kept(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("SOLVER.MAX_ITER", "2", *MEASURED)
    trainer = trained(cfg)
    groups = groups_of(cfg)
    norms = {norm for norm, _ in groups.values()}
    assert norms == {"GN_MEASURED", "GN_PRACTICAL"}  # the heads keep theirs
    assert all(count for _, count in groups.values())
    assert counts_of(trainer.model) == {
        name: count for name, (norm, count) in groups.items() if norm == "GN_MEASURED"
    }
    assert "by the law" in log_of(cfg)

    # Neither a resumed run nor evaluation measures again: nothing is there to measure with.
    monkeypatch.setattr("gnpractical.runs.calibrate_measured.calibrate", None)
    cfg = tiny_cfg("SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", *MEASURED)
    trained(cfg, resume=True)
    assert groups_of(cfg) == groups
    cfg = tiny_cfg(*MEASURED)
    assert Trainer.evaluate(cfg, resume=True)
    model = Trainer.build_model(cfg)
    GNPCheckpointer(model).load(f"{cfg.OUTPUT_DIR}/model_final.pth")
    assert counts_of(model) == counts_of(trainer.model)


def test_weights_of_other_counts_are_a_mismatch(tiny_cfg, tmp_path):
    check_output_dir(str(tmp_path), "OUTPUT_DIR")
    GNPCheckpointer(Trainer.build_model(tiny_cfg()), str(tmp_path)).save("practical")
    model = Trainer.build_model(tiny_cfg(*MEASURED))
    with pytest.raises(GroupMismatch, match="G=1 in the file, GN_MEASURED in the model"):
        GNPCheckpointer(model).load(str(tmp_path / "practical.pth"))
    GNPCheckpointer(model, mismatch="warn").load(str(tmp_path / "practical.pth"))
    assert set(counts_of(model).values()) == {None}


def test_counts_from_a_checkpoint_are_not_measured_again(tiny_cfg):
    model = Trainer.build_model(tiny_cfg(*MEASURED))
    norms = measured_norms(model)
    first = next(iter(norms))
    norms[first].set_num_groups(norms[first].num_channels)
    trainer = Trainer(tiny_cfg(*MEASURED))
    with EventStorage():
        calibrate_measured(model, trainer.extra_batches(1))
    assert norms[first].num_groups == norms[first].num_channels
    assert all(norm.num_groups for norm in norms.values())


def test_measured_counts_are_checked_against_other_rules(tiny_cfg, tmp_path):
    check_output_dir(str(tmp_path), "OUTPUT_DIR")
    model = Trainer.build_model(tiny_cfg(*MEASURED))
    for norm in measured_norms(model).values():
        norm.set_num_groups(norm.num_channels)
    GNPCheckpointer(model, str(tmp_path)).save("measured")
    checkpointer = GNPCheckpointer(Trainer.build_model(tiny_cfg()))
    with pytest.raises(GroupMismatch, match="MODEL.RESNETS.NORM GN_MEASURED"):
        checkpointer.load(str(tmp_path / "measured.pth"))


def test_a_norm_that_does_not_run_is_warned_of(tiny_cfg):
    cfg = tiny_cfg(
        "SOLVER.MAX_ITER",
        "1",
        "DATASETS.TEST",
        "()",
        "MODEL.ROI_MASK_HEAD.NORM",
        "GN_MEASURED",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        "[0.99999]",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
        "0.0",
    )
    trained(cfg)
    assert groups_of(cfg)["roi_heads.mask_head.mask_fcn1.norm"] == ("GN_MEASURED", 1)
    assert "1 norms could not be measured" in log_of(cfg)


def test_the_probe_writes_and_changes_nothing(tiny_cfg):
    weights = []
    for period in ("0", "2"):
        cfg = tiny_cfg(
            "SOLVER.MAX_ITER",
            "4",
            "DATASETS.TEST",
            "()",
            "SEED",
            "5",
            "MODEL.GNP.PROBE_PERIOD",
            period,
            "OUTPUT_DIR",
            f"{tiny_cfg().OUTPUT_DIR}{period}",
        )
        from detectron2.utils.env import seed_all_rng

        seed_all_rng(5)
        weights.append(trained(cfg).model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=0)
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as f:
        scalars = {k: v for line in f for k, v in json.loads(line).items()}
    prefix = "gradient_variance_ratio/"
    assert scalars[f"{prefix}mean_abs_log"] > 0
    assert scalars[f"{prefix}backbone.bottom_up.stem.conv1.norm"] > 0


def test_keys_that_choose_a_group_norm(tiny_cfg):
    keys = group_norm_keys(tiny_cfg("MODEL.RESNETS.NORM", "FrozenBN"))
    assert "MODEL.FPN.NORM" in keys and "MODEL.SEM_SEG_HEAD.NORM" in keys
    assert "MODEL.RESNETS.NORM" not in keys


@pytest.mark.parametrize("key, value", [("CALIBRATION_BATCHES", "0"), ("PROBE_PERIOD", "-1")])
def test_bad_periods(tiny_cfg, key, value):
    with pytest.raises(ValueError, match=key):
        tiny_cfg(f"MODEL.GNP.{key}", value)
