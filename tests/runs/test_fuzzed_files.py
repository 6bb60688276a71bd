"""Mutations of a checkpoint and of a config: as before, or a ValueError; nothing else."""

from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="Hypothesis is not installed")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gnpractical.layers import PracticalGroupNorm
from gnpractical.runs.checkpointer import GroupCheckpointer

CONFIGS = Path(__file__).parents[2] / "configs"
FUZZ = settings(
    max_examples=150,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(("flip", "cut", "insert", "drop")), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=3,
)


def edited(content, edits):
    for place, kind, inserted in edits:
        at = int(place * max(len(content) - 1, 0))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + inserted + content[at:]
        elif kind == "drop":
            content = content[:at] + content[at + len(inserted) + 1 :]
    return content


class Checkpointer(GroupCheckpointer):
    def advice(self, differing, record):
        return "Match them"

    def resnet_advice(self, resnet):
        return "another"


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), PracticalGroupNorm(8), nn.Conv2d(8, 4, 1))


@FUZZ
@given(EDITS)
def test_checkpoints(tmp_path, edits):
    model = small()
    if not (tmp_path / "sound.pth").exists():
        Checkpointer(model, str(tmp_path)).save("sound")
    path = tmp_path / "edited.pth"
    path.write_bytes(edited((tmp_path / "sound.pth").read_bytes(), edits))
    loaded = small()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    try:
        Checkpointer(loaded).load(str(path))
    except ValueError as e:
        assert "edited.pth" in str(e)
        assert not any(parameter.any() for parameter in loaded.parameters())  # nothing half loaded
    else:
        torch.testing.assert_close(loaded.state_dict(), model.state_dict())


@FUZZ
@given(EDITS)
def test_configs(tmp_path, edits):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from gnpractical.d2 import load_config

    text = (CONFIGS / "quick" / "Base-Shapes-RCNN-FPN.yaml").read_bytes()
    path = tmp_path / "edited.yaml"
    path.write_bytes(edited(text, edits))
    try:
        load_config(str(path))
    except ValueError as e:
        assert str(e) and "\n" not in str(e)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gnp_groups": {"1": {"num_groups": torch.ones(2)}}}, "KeyError|TypeError"),
        ({"gnp_groups": {3: {}}}, "TypeError"),
        ({"gnp_groups": {"1": None}}, "TypeError"),
        ({"gnp_groups": [1, 2]}, "AttributeError"),
        ({"iteration": "many"}, "iteration must be a number from 0 on, got 'many'"),
        ({"iteration": -7}, "iteration must be a number from 0 on, got -7"),
    ],
)
def test_tampered_records(tmp_path, change, message):
    model = small()
    Checkpointer(model, str(tmp_path)).save("own")
    saved = torch.load(tmp_path / "own.pth", weights_only=True)
    torch.save(saved | change, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=rf"own.pth is no checkpoint.*({message})"):
        Checkpointer(small()).load(str(tmp_path / "own.pth"))
