import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logs_reach_caplog():
    """Undo what Detectron2's setup_logger, called by a trainer, does to our loggers."""
    logging.getLogger("gnpractical").propagate = True
