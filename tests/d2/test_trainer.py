import json
import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.engine import DefaultTrainer, HookBase
from torch import nn

from gnpractical.d2.trainer import Trainer, adapt_to_device
from gnpractical.runs.group_record import GroupMismatch
from gnpractical.runs.output_dir import check_output_dir


def make_trainer(cfg, resume=False):
    check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def metrics_of(cfg):
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as f:
        return [json.loads(line) for line in f]


def test_a_stop_keeps_the_schedule_and_is_resumed(tiny_cfg):
    options = ["SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", "MODEL.GNP.STOP_AT"]
    for stop, last in (("2", 1), ("0", 3)):
        trainer = make_trainer(tiny_cfg(*options, stop), resume=True)
        trainer.train()
        assert trainer.iter == last + 1
    rates = {line["iteration"]: line["lr"] for line in metrics_of(tiny_cfg(*options, "0"))}
    whole = tiny_cfg(
        "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", "OUTPUT_DIR", f"{tiny_cfg().OUTPUT_DIR}2"
    )
    make_trainer(whole).train()
    assert rates[3] == metrics_of(whole)[-1]["lr"]


@pytest.mark.parametrize("config", ["pfpn_gnp_shapes.yaml", "faster_rcnn_gnp_ws_shapes.yaml"])
def test_trains_evaluates_and_leaves_its_files(tiny_cfg, tmp_path, config):
    cfg = tiny_cfg(config=config)
    trainer = make_trainer(cfg)
    first = HookBase()
    first.before_step = lambda: seen.append((tmp_path / "out/groups.json").read_text())
    seen: list[str] = []
    trainer.register_hooks([first])
    trainer.train()
    groups = json.loads(seen[0])  # before the first step
    assert {g["norm"] for g in groups} == {"GN_PRACTICAL"} and groups[0]["num_groups"] >= 1
    assert {g["weight_standardized"] for g in groups} == {"_ws" in config}
    for name in ["model_final.pth", "metrics.json", "log.txt", "inference/predictions.png"]:
        assert (tmp_path / "out" / name).stat().st_size > 0
    results = metrics_of(cfg)[-1]
    assert "bbox/AP" in results
    assert ("panoptic_seg/PQ" in results) == config.startswith("pfpn")
    assert list((tmp_path / "out").glob("events.out.tfevents*"))
    log = (tmp_path / "out/log.txt").read_text()
    assert "Group counts:" in log and "G_ideal" in log
    assert re.search(r"bbox AP .*Group counts: .*groups.json", log)


def test_resume_goes_on_where_it_was(tiny_cfg):
    make_trainer(tiny_cfg("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()")).train()
    cfg = tiny_cfg("SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()")
    trainer = make_trainer(cfg, resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    assert trainer.iter == 4
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_final.pth")


def test_resume_with_other_counts_stops(tiny_cfg):
    make_trainer(tiny_cfg("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")).train()
    with pytest.raises(GroupMismatch, match="MODEL.RESNETS.NORM GN_PRACTICAL"):
        make_trainer(tiny_cfg("MODEL.RESNETS.NORM", "GN_2"), resume=True)


def test_a_loss_that_is_not_finite_names_iteration_losses_and_last_good_checkpoint(tiny_cfg):
    trainer = make_trainer(tiny_cfg("DATASETS.TEST", "()"))
    hook = HookBase()
    weight = trainer.model.sem_seg_head.predictor.weight
    hook.before_step = lambda: weight.data.fill_(float("nan")) if trainer.iter == 2 else None
    trainer.register_hooks([hook])
    with pytest.raises(FloatingPointError) as e:
        trainer.train()
    for part in ["iteration=2", "loss_sem_seg", "model_0000001.pth", "SOLVER.BASE_LR"]:
        assert part in str(e.value)


def test_norms_without_a_count_stop_before_training(tiny_cfg, monkeypatch):
    from detectron2.engine import DefaultTrainer
    from detectron2.layers import get_norm

    model = nn.ModuleDict({"odd": nn.ModuleList([get_norm("GN_PRACTICAL", 24)])})
    monkeypatch.setattr(DefaultTrainer, "build_model", classmethod(lambda cls, cfg: model))
    with pytest.raises(ValueError, match=r"odd\.0 \(GN_PRACTICAL, 24 channels\)"):
        Trainer.build_model(tiny_cfg())


def test_evaluation_alone_gives_the_same_numbers(tiny_cfg):
    cfg = tiny_cfg()
    make_trainer(cfg).train()
    trained = metrics_of(cfg)[-1]
    for source in [{"resume": True}, {"resume": False}]:
        cfg.MODEL.WEIGHTS = "" if source["resume"] else f"{cfg.OUTPUT_DIR}/model_final.pth"
        results = Trainer.evaluate(cfg, **source)
        assert results["panoptic_seg"]["PQ"] == pytest.approx(
            trained["panoptic_seg/PQ"], nan_ok=True
        )
        assert results["sem_seg"]["mIoU"] == pytest.approx(trained["sem_seg/mIoU"])


def test_no_gpu_means_cpu_with_one_line(tiny_cfg, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = tiny_cfg("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True")
    adapt_to_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    assert re.fullmatch(r"No GPU is available: running on the CPU .*\n", capsys.readouterr().out)
    cfg = tiny_cfg("MODEL.DEVICE", "cpu")
    adapt_to_device(cfg)
    assert capsys.readouterr().out == ""


def test_weights_move_with_the_learning_rate_only(tiny_cfg):
    weights = []
    for lr in ("1e-12", "0.01"):
        cfg = tiny_cfg("SOLVER.BASE_LR", lr, "DATASETS.TEST", "()")
        torch.manual_seed(3)
        trainer = make_trainer(cfg)
        before = trainer.model.backbone.fpn_output2.weight.detach().clone()
        trainer.train()
        weights.append((trainer.model.backbone.fpn_output2.weight - before).abs().max().item())
    assert weights[0] < 1e-8 < 1e-4 < weights[1]


def test_scores_of_nothing_are_said_to_be_so(monkeypatch, caplog, tiny_cfg):
    scores = {"bbox": {"AP": float("nan")}, "panoptic_seg": {"PQ": 12.34}}
    monkeypatch.setattr(DefaultTrainer, "test", lambda *_: scores)
    with caplog.at_level("INFO"):
        assert Trainer.test(tiny_cfg(), None) == scores
    assert (
        "bbox AP nan (nothing predicted, or nothing to find), panoptic_seg PQ 12.3" in caplog.text
    )


def test_accumulated_batches_make_one_iteration(tiny_cfg):
    options = ["SOLVER.ACCUMULATE", "3", "SOLVER.MAX_ITER", "2"]
    cfg = tiny_cfg(*options)
    trainer = make_trainer(cfg)
    seen = []
    model = trainer.checkpointer.model
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    trainer.train()
    assert seen[:6] == [2] * 6 and seen[6:] == [1] * 4  # and then the evaluation
    assert [line["iteration"] for line in metrics_of(cfg) if "total_loss" in line] == [1]
    assert "panoptic_seg/PQ" in metrics_of(cfg)[-1] and trainer.scheduler.last_epoch == 2
    again = make_trainer(tiny_cfg("SOLVER.ACCUMULATE", "3", "SOLVER.MAX_ITER", "3"), resume=True)
    assert again.start_iter == 2
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER 1 must be at least the 2 that"):
        make_trainer(tiny_cfg("SOLVER.MAX_ITER", "1"), resume=True).train()


@pytest.mark.slow
def test_augmented_evaluation(tiny_cfg):
    options = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)", "SOLVER.MAX_ITER", "1"]
    cfg = tiny_cfg(*options, config="faster_rcnn_gnp_ws_shapes.yaml")
    make_trainer(cfg).train()
    assert "bbox_TTA/AP" in metrics_of(cfg)[-1]
    cfg = tiny_cfg(*options, config="faster_rcnn_gnp_ws_shapes.yaml")
    scores = Trainer.evaluate(cfg, resume=True)
    assert {"bbox", "bbox_TTA"} <= scores.keys()
