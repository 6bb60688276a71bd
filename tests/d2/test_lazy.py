"""LazyConfigs of Detectron2: that they are read, and build what YAML configs build."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from helpers.lazy_tiny import NORMS, TINY

from gnpractical.d2 import load_config
from gnpractical.d2.lazy import lazy_trainer, lazy_words, yaml_config
from gnpractical.d2.lazy_config import load_lazy_config
from gnpractical.measure.layer_report import group_report
from gnpractical.runs.output_dir import check_output_dir

CONFIGS = Path(__file__).parents[2] / "configs"
LAZY = CONFIGS / "lazy"
HEADS = ["MODEL.ROI_BOX_HEAD.NORM", "GN_PRACTICAL", "MODEL.ROI_MASK_HEAD.NORM", "GN_PRACTICAL"]
# The YAML config of the same model, with overrides.
EQUAL = {
    "mask_rcnn_gnp_100ep_LSJ": ("Base-Scratch-GN.yaml", ["MODEL.MASK_ON", "True", *HEADS]),
    "pfpn_gnp_full": ("pfpn_gnp_full.yaml", []),
}


def built(lazy):
    """The model as the trainer builds it, and the config by which it does."""
    cfg = yaml_config(lazy)
    return lazy_trainer(lazy).build_model(cfg), cfg


def rows_of(model):
    return [(row.name, row.norm, row.in_channels, row.num_groups) for row in group_report(model)]


@pytest.mark.parametrize("name", EQUAL)
def test_the_counts_are_those_of_the_equal_yaml_config(name):
    file, options = EQUAL[name]
    equal = build_model(load_config(str(CONFIGS / file), ["MODEL.DEVICE", "cpu", *options]))
    model, _ = built(load_lazy_config(f"{LAZY}/{name}.py", ["train.device=cpu"]))
    assert len(rows_of(model)) == {"mask_rcnn_gnp_100ep_LSJ": 69, "pfpn_gnp_full": 76}[name]
    assert sorted(rows_of(model)) == sorted(rows_of(equal))
    assert {norm for _, norm, *_ in rows_of(model)} == {"GN_PRACTICAL"}


def test_the_baselines_training_is_kept():
    baseline = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    lazy = load_lazy_config(f"{LAZY}/mask_rcnn_gnp_100ep_LSJ.py")
    for key in ("optimizer", "lr_multiplier"):
        assert lazy[key] == baseline[key]
    assert lazy.dataloader.train == baseline.dataloader.train
    cfg = yaml_config(lazy)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (184375, 64)
    assert cfg.SOLVER.AMP.ENABLED and cfg.MODEL.MASK_ON and cfg.DATASETS.TEST == ("coco_2017_val",)


@pytest.mark.parametrize(
    "norm", ["GN_PRACTICAL", "GN_CLOSEST", "GN_EXACT", "GN_4", "GN_UPTO_32", "GN_CPG_4"]
)
def test_every_name_by_overrides(norm):
    norms = [f"{key}={norm}" for key in [*NORMS, "model.sem_seg_head.norm"]]
    model, _ = built(load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", [*TINY["pfpn_gnp_full"], *norms]))
    rows = group_report(model)
    assert {row.norm for row in rows} == {norm} and all(row.num_groups for row in rows)


def test_names_in_detectron2s_own_configs():
    lazy = load_lazy_config(
        model_zoo.model_zoo.get_config_file("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"),
        ["train.device=cpu", *(f"{key}=GN_8" for key in NORMS)],
    )
    assert "gnp" in lazy and yaml_config(lazy).MODEL.GNP == load_config("").MODEL.GNP
    assert {row.num_groups for row in group_report(instantiate(lazy.model))} == {8}


def test_the_gnp_section_has_the_yaml_configs_keys_and_defaults():
    gnp = runpy.run_path(str(LAZY / "common.py"))["gnp"]
    defaults = load_config("")
    assert {key.upper(): value for key, value in gnp.items()} == (
        dict(defaults.MODEL.GNP) | {"ACCUMULATE": defaults.SOLVER.ACCUMULATE}
    )
    overrides = ["gnp.match_batches=3", "gnp.accumulate=2", "gnp.checkpoint_mismatch=warn"]
    cfg = yaml_config(load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides))
    assert cfg.MODEL.GNP.MATCH_BATCHES == 3 and cfg.SOLVER.ACCUMULATE == 2
    assert cfg.MODEL.GNP.CHECKPOINT_MISMATCH == "warn"


def test_parts_are_weight_standardized():
    overrides = [*TINY["pfpn_gnp_full"], "gnp.weight_standardization=[roi_heads.box_head]"]
    model, _ = built(load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides))
    standardized = {row.name for row in group_report(model) if row.weight_standardized}
    assert standardized == {"roi_heads.box_head.conv1.norm"}
    overrides[-1] = "gnp.weight_standardization=[bone]"
    lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides)
    with pytest.raises(ValueError, match="^gnp.weight_standardization: .*'bone'"), lazy_words():
        built(lazy)


def test_keys_that_may_be_added():
    overrides = ["train.seed=3", "model.sem_seg_head.loss_weight=2", "dataloader.evaluator=null"]
    overrides += ["model.pixel_mean.0=1.5", "dataloader.train.aspect_ratio_grouping=false"]
    lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides)
    assert lazy.train.seed == 3 and lazy.model.pixel_mean[0] == 1.5
    assert lazy.dataloader.train.aspect_ratio_grouping is False


@pytest.mark.parametrize(
    "override, message",
    [
        ("trian.max_iter=3", "key: trian.max_iter; the nearest valid key is train.max_iter$"),
        ("train.max_iters=3", "key: train.max_iters; the nearest valid key is train.max_iter$"),
        ("train.max_iter.x=3", "Non-existent config key: train.max_iter.x"),
        ("model.backbone.nrom=GN_4", "the nearest valid key is model.backbone.norm$"),
        ("gnp.match_batch=2", "the nearest valid key is gnp.match_batches$"),
        ("gnp={match_batch: 2}", "the nearest valid key is gnp.match_batches$"),
        ("model.backbone.norm=GN_PRACTICLE", "^model.backbone.norm: Unknown norm.*GN_PRACTICAL"),
        ("gnp=3", "gnp must be a mapping, got 3"),
        ("gnp.stop_at=-1", "^gnp.stop_at must be at least 0, got -1"),
        ("gnp.checkpoint_mismatch=no", "gnp.checkpoint_mismatch"),
        ("train.max_iter=many", "^Type mismatch .* for config key: train.max_iter$"),
        ("train.max_iter", "^Overrides are key=value; got 'train.max_iter'$"),
        ("train.max_iter=[", r"^train.max_iter=\["),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=message), lazy_words():
        yaml_config(load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", [override]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = dict(", "SyntaxError"),
        ("from .nothing import model", "ImportError: Cannot import name nothing"),
        ("model = dict()", "dataloader must be a mapping, got None"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "odd.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"odd\.py: .*{message}|{message}.*odd\.py"):
        load_lazy_config(str(path))


def test_options_that_are_not_read_are_said(caplog):
    load_lazy_config(f"{LAZY}/pfpn_gnp_full.py")
    assert not caplog.records
    load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", ["train.log_period=5"])
    assert "train.log_period is not read by this trainer, which takes 20" in caplog.text


def test_messages_have_the_keys_of_lazy_configs():
    message = (
        "MODEL.FPN.NORM GN_4, set MODEL.GNP.MATCH_BATCHES 2, SOLVER.MAX_ITER_X or "
        "x.OUTPUT_DIR; MODEL.RESNETS.NORM FrozenBN. DATASETS.TRAIN must be SOLVER.BASE."
    )
    with pytest.raises(ValueError) as e, lazy_words():
        raise OSError(message)
    assert str(e.value) == (
        "model.backbone.norm=GN_4, set gnp.match_batches=2, SOLVER.MAX_ITER_X or "
        "x.OUTPUT_DIR; model.backbone.bottom_up.{stem,stages}.norm=FrozenBN. "
        "dataloader.train.dataset.names must be SOLVER.BASE."
    )


def test_several_data_sets_are_evaluated_one_at_a_time(few_shapes):
    overrides = [
        *TINY["pfpn_gnp_full"],
        "dataloader.test.dataset.names=[gnp_shapes_val,gnp_shapes_train]",
    ]
    lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides)
    cfg = yaml_config(lazy)
    assert cfg.DATASETS.TEST == ("gnp_shapes_val", "gnp_shapes_train")
    loaders = [lazy_trainer(lazy).build_test_loader(cfg, name) for name in cfg.DATASETS.TEST]
    assert [len(loader.dataset) for loader in loaders] == [4, 8]


def test_the_configs_own_evaluator_is_taken(few_shapes, tmp_path):
    lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", TINY["pfpn_gnp_full"])
    cfg, trainer = yaml_config(lazy), lazy_trainer(lazy)
    assert len(trainer.build_evaluator(cfg, "gnp_shapes_val")._evaluators) == 4
    own = model_zoo.get_config("common/data/coco.py").dataloader.evaluator
    lazy.dataloader.evaluator = own
    trainer.build_test_loader(cfg, "gnp_shapes_val")
    assert type(trainer.build_evaluator(cfg, "gnp_shapes_val")).__name__ == "COCOEvaluator"


@pytest.fixture
def trainer_of(few_shapes, tmp_path):
    """A function (overrides) -> the trainer of a tiny model, its weights loaded."""

    def make(*overrides, out="out"):
        tiny = [*TINY["pfpn_gnp_full"], "train.max_iter=1", "dataloader.test.dataset.names=[]"]
        overrides = [*tiny, f"train.output_dir={tmp_path / out}", *overrides]
        lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides)
        cfg = yaml_config(lazy)
        check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        trainer = lazy_trainer(lazy)(cfg)
        trainer.resume_or_load(resume=False)
        return trainer

    return make


@pytest.mark.slow
def test_weights_of_other_norms_are_refused_or_matched(trainer_of, tmp_path):
    trainer_of("model.backbone.norm=GN_4").train()
    begin = f"train.init_checkpoint={tmp_path}/out/model_final.pth"
    message = "backbone.norm=GN_4.*gnp.match_batches=2.*gnp.checkpoint_mismatch=warn"
    with pytest.raises(ValueError, match=message), lazy_words():
        trainer_of(begin)
    trainer_of(begin, "gnp.match_batches=2", out="matched").train()
    rows = json.loads((tmp_path / "matched" / "groups.json").read_text())
    matched = {row["name"] for row in rows if row["matched_from"]}
    assert len(matched) == 8 and all(name.startswith("backbone.fpn_") for name in matched)
    with pytest.raises(
        ValueError, match="gnp.match_batches=50 of .*=2 are more than the 8 training"
    ):
        with lazy_words():
            trainer_of(begin, "gnp.match_batches=50").train()


@pytest.mark.slow
def test_a_loss_that_is_not_finite(trainer_of):
    trainer = trainer_of()
    trainer.model.sem_seg_head.predictor.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError) as e, lazy_words():
        trainer.train()
    for part in ("iteration=0", "loss_sem_seg", "There is no checkpoint in "):
        assert part in str(e.value)
    advice = "Try a lower optimizer.lr or a longer lr_multiplier.warmup_length."
    assert str(e.value).endswith(advice)


def test_batches_for_calibration_start_no_processes():
    overrides = [*TINY["pfpn_gnp_full"], "dataloader.train.num_workers=2"]
    lazy = load_lazy_config(f"{LAZY}/pfpn_gnp_full.py", overrides)
    lazy.dataloader.train.dataset = None
    lazy.dataloader.train._target_ = lambda **arguments: arguments["num_workers"]
    trainer, cfg = lazy_trainer(lazy), yaml_config(lazy)
    assert trainer.build_train_loader(cfg) == 2
    cfg.DATALOADER.NUM_WORKERS = 0  # as Trainer.extra_batches does
    assert trainer.build_train_loader(cfg) == 0
