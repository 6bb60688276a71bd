"""Wrong options and config values: each ends a tool with a line that names what is wrong.

None may crash, hang, end in a traceback, or succeed.
"""

import pytest
from helpers.forked_tool import ONE_STEP

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

SHAPES = "--config-file {root}/configs/quick/pfpn_gnp_shapes.yaml"
CLASSES = "--dataset {classes} --arch bottleneck11 --image-size 16 --epochs 1 --seeds 1 --workers 0"
# Each tool, what it is called with, and a line for each option with values that it cannot take.
OPTIONS = {
    "train_torchvision.py": (
        ONE_STEP["train_torchvision.py"],
        """--norm GN_ GN_0 GN_-1 GN_1.5 GN_48 GN_CPG_0 GN_CPG_x GN_UPTO_ GROUPNORM 32 LN
        --iterations 0 -1 nan 1.5 x
        --batch-size 0 -1 x
        --accumulate 0 -1 x
        --lr nan -1 x
        --warmup -1 x
        --momentum -1 nan x
        --weight-decay -1 nan
        --clip-grad-norm -1 nan
        --checkpoint-period 0 -5
        --calibration-batches 0 -1
        --match-batches -1 x 1000
        --stop-at -1
        --workers -1 x
        --min-size 0 -1 x
        --max-size 0 -1
        --depth 0 49 x
        --model resnet50
        --device gpu cuda:x tpu
        --dataset none ../none /dev/null
        --data-path /dev/null/x
        --weights gone.pth /dev/null / {root}/setup.py
        --weights-backbone gone.pth /dev/null / {root}/README.md
        --checkpoint-mismatch maybe
        --seed x""",
    ),
    "train_net.py": (
        ONE_STEP["train_net.py"],
        """MODEL.RESNETS.NORM GN_ GN_0 GN_48 GN_CPG_0 GN_UPTO_x GN_PRATICAL
        MODEL.FPN.NORM GN_48 GN_PRACTICALS
        MODEL.ROI_BOX_HEAD.NORM GN_7
        MODEL.RESNETS.DEPTH 0 51 x
        MODEL.RESNETS.RES2_OUT_CHANNELS 0
        MODEL.FPN.IN_FEATURES [] ["res9"]
        MODEL.ROI_HEADS.NUM_CLASSES 0 1 x
        MODEL.SEM_SEG_HEAD.NUM_CLASSES 0 54
        MODEL.META_ARCHITECTURE Nothing
        MODEL.BACKBONE.NAME build_nothing
        MODEL.DEVICE gpu
        MODEL.WEIGHTS gone.pth /dev/null {root}/setup.py
        MODEL.GNP.WEIGHT_STANDARDIZATION ["nothing"] 3
        MODEL.GNP.CHECKPOINT_MISMATCH maybe
        MODEL.GNP.CALIBRATION_BATCHES 0 -1
        MODEL.GNP.MATCH_BATCHES -1 x
        MODEL.GNP.PROBE_PERIOD -1
        MODEL.GNP.STOP_AT -1
        MODEL.GNP.NORM GN_PRACTICAL
        MODEL.GNP.NORMS GN
        DATASETS.TRAIN ("none",) () ("gnp_shape_train",)
        DATASETS.TEST ("none",)
        SOLVER.MAX_ITER 0 -1 x
        SOLVER.IMS_PER_BATCH 0 -2
        SOLVER.ACCUMULATE 0 -1 x
        SOLVER.BASE_LR -1 nan x
        SOLVER.WARMUP_ITERS -1
        SOLVER.CHECKPOINT_PERIOD 0 -1
        SOLVER.BASE_RL 1
        OUTPUT_DIR /dev/null/x
        TEST.EVAL_PERIOD -1
        TEST.AUG.ENABLED True
        DATALOADER.NUM_WORKERS -1""",
    ),
    "report_groups.py": (
        SHAPES,
        """--config-file gone.yaml {root}/setup.py {root}/README.md /dev/null/x
        --format xml
        MODEL.RESNETS.NORM GN_48 GN_X
        MODEL.RESNETS.DEPTH 7
        MODEL.WEIGHTED 1
        MODEL.DEVICE""",
    ),
    "measure_gradients.py": (
        SHAPES + " --output {out}",
        """--groups 48 many 0
        --batches 0 -1 x
        --output /dev/null/x""",
    ),
    "compare_groups.py": (
        "--output {out}" + " " + SHAPES,
        """--groups 48 many 0 -3
        --seeds 0 -1 x
        --output /dev/null/x
        --config-file gone.yaml""",
    ),
    "train_classifier.py": (
        CLASSES + " --output {out} --groups 1",
        """--dataset none pets caltech101 /dev/null
        --arch vgg16
        --groups 48 many 0 -3 7
        --seeds 0 -1 x
        --image-size 0 -1 x
        --epochs 0 -1 x
        --lr 0 -1 nan x
        --momentum -1 nan
        --weight-decay -1 nan
        --batch-size 0 -1 x
        --workers -1 x
        --output /dev/null/x
        --device gpu""",
    ),
    "train_mlp.py": (
        "--data {out} --output {out}",
        """--groups many 0 -3
        --seeds 0 -1
        --epochs 0 -1 x
        --lr 0 -1 nan
        --momentum -1
        --weight-decay -1
        --batch-size 0 -1
        --data /dev/null/x
        --device gpu""",
    ),
    "prepare_panoptic.py": ("--root {out}", "--splits none\n--root /dev/null/x\n--workers x"),
    "validate_theory.py": ("gradients", "--trials 0 -1 x\n--csv /dev/null/x"),
}
CASES = [
    (tool, base, line.split()[0], value)
    for tool, (base, lines) in OPTIONS.items()
    for line in lines.splitlines()
    for value in line.split()[1:] or [None]
]


@pytest.mark.slow
@pytest.mark.parametrize("tool, base, option, value", CASES)
def test_options(refused, places, tool, base, option, value):
    line = refused(tool, " ".join(filter(None, (base, option, value))))
    named = option.strip("-").split("=")[0].split(".")[-1].lower()
    value = (value or "").format(**places)
    words = (named, named.replace("-", "_"), value.strip('("[]),').lower() or named)
    assert any(word in line.lower() for word in words), line
