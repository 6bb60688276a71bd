"""Detectron2's trainer as it is on a GPU."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")


from gnpractical.d2.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def trained(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    assert all(v.isfinite().all() for v in trainer.model.parameters())
    return trainer


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_mixed_precision(gpu, tiny_cfg, accumulate):
    if gpu == "cpu":
        pytest.skip("Detectron2's AMP trainer knows CUDA only")
    options = ["MODEL.DEVICE", gpu, "SOLVER.AMP.ENABLED", "True", "SOLVER.ACCUMULATE", accumulate]
    trainer = trained(tiny_cfg(*options))
    assert trainer._trainer.grad_scaler.get_scale() >= 2.0**8  # the first scale is 2**16


def test_a_run_goes_on_on_another_device(gpu, tiny_cfg):
    trained(tiny_cfg("MODEL.DEVICE", gpu, "SOLVER.MAX_ITER", "1"))
    trained(tiny_cfg("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2"), resume=True)
    trainer = trained(tiny_cfg("MODEL.DEVICE", gpu, "SOLVER.MAX_ITER", "3"), resume=True)
    assert trainer.iter == 3 and next(trainer.model.parameters()).device.type == gpu


def test_weight_standardization_and_measured_groups(gpu, tiny_cfg):
    options = ["MODEL.DEVICE", gpu, "MODEL.GNP.WEIGHT_STANDARDIZATION", '["backbone"]']
    for key in ("RESNETS", "FPN"):
        options += [f"MODEL.{key}.NORM", "GN_MEASURED"]
    trainer = trained(tiny_cfg(*options, "MODEL.GNP.PROBE_PERIOD", "1"))
    norms = [m for m in trainer.model.modules() if getattr(m, "rule", "") == "measured"]
    assert norms and all(norm.num_groups for norm in norms)


def test_evaluation_equals_that_on_the_cpu(gpu, tiny_cfg):
    cfg = tiny_cfg("MODEL.DEVICE", gpu, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    trained(cfg)
    found = {}
    for place in (gpu, "cpu"):
        cfg.MODEL.DEVICE = place
        found[place] = Trainer.evaluate(cfg, resume=True)
    for task, scores in found["cpu"].items():
        for name, score in scores.items():
            assert found[gpu][task][name] == pytest.approx(score, abs=2.0, nan_ok=True), name
