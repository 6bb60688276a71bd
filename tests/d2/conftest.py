from pathlib import Path

import pytest

QUICK = Path(__file__).parents[2] / "configs" / "quick"
FEW = {"train": 8, "val": 4}
TINY = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "INPUT.MIN_SIZE_TRAIN",
    "(64,)",
    "INPUT.MIN_SIZE_TEST",
    "64",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.MAX_ITER",
    "3",
    "SOLVER.BASE_LR",
    "0.001",
    "SOLVER.WARMUP_ITERS",
    "1",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SOLVER.CHECKPOINT_PERIOD",
    "1",
]


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory):
    """A folder for $DETECTRON2_DATASETS with a few gnp_shapes images."""
    from gnpractical.datasets.shapes import make_shapes

    root = tmp_path_factory.mktemp("datasets")
    make_shapes(root, FEW)
    return root


@pytest.fixture
def few_shapes(datasets_dir):
    """gnp_shapes_{train,val} registered over a few images instead of the real data set."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from gnpractical.d2.datasets import register_shapes
    from gnpractical.datasets.coco_files import datasets_root

    def register(root):
        for split in FEW:
            DatasetCatalog.remove(f"gnp_shapes_{split}")
            MetadataCatalog.remove(f"gnp_shapes_{split}")
        register_shapes(str(root))

    register(datasets_dir)
    yield datasets_dir
    register(datasets_root())


@pytest.fixture
def tiny_cfg(tmp_path, few_shapes):
    """A function (overrides, config) -> config of a model that trains in seconds."""
    from gnpractical.d2 import load_config

    def make(*opts, config="pfpn_gnp_shapes.yaml"):
        return load_config(str(QUICK / config), [*TINY, "OUTPUT_DIR", str(tmp_path / "out"), *opts])

    return make
