import logging
import os

import pytest
import torch

from gnpractical.layers import standardized_weight

# Triton looks at this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """Undo what Detectron2's setup_logger, called by a trainer, does to our loggers."""
    logging.getLogger("gnpractical").propagate = True


@pytest.fixture
def computed(monkeypatch):
    """The weights that were standardized, one entry for each time."""
    weights = []
    original = standardized_weight._standardize

    def count(weight, *args):
        weights.append(weight)
        return original(weight, *args)

    monkeypatch.setattr(standardized_weight, "_standardize", count)
    return weights
