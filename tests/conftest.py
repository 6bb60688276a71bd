import logging
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def gpu():
    """The device of tests for a GPU. $GNPRACTICAL_TEST_DEVICE=cpu rehearses them without one."""
    device = os.environ.get("GNPRACTICAL_TEST_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return device


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """Undo what Detectron2's setup_logger, called by a trainer, does to our loggers."""
    logging.getLogger("gnpractical").propagate = True
