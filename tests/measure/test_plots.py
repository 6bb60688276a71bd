import pytest
from PIL import Image

from gnpractical.measure.gradient_isometry import BlockGradient
from gnpractical.measure.plots import (
    block_gradients,
    isometry_curve,
    learning_curves,
    predicted_and_measured,
)
from gnpractical.paper.simulation import Isometry


def block(name, num_groups, variance):
    return BlockGradient(name, "conv", 64, 32, num_groups, "relu", variance, 1.0, 0, "")


def is_picture(path):
    with Image.open(path) as image:
        assert min(image.size) > 200 and len(set(image.convert("L").resize((64, 64)).getdata())) > 3


def test_each_figure_is_written(tmp_path):
    learning_curves({"a": [2.0, 1.0], "b": {10: 3.0, 20: 0.0}}, tmp_path / "curves.png", "loss")
    rows = {
        "32": [block("a.norm", 32, 2.0), block("b.norm", 32, None)],
        "1": [block("a.norm", 1, 0.5), block("b.norm", 1, 0.1)],
    }
    law = {"32": {"a.norm": 2.1}, "1": {"a.norm": None}}
    block_gradients(rows, law, tmp_path / "blocks.png", title="a model")
    pairs = {"law": [(1.0, 1.1), (4.0, 3.9)], "paper": []}
    predicted_and_measured(pairs, tmp_path / "scatter.png", title="a model")
    points = [Isometry(8, 8, g, "B", 1.1, 0.1, 1.2, 1.1) for g in (1, 2)]
    isometry_curve(points, tmp_path / "b.png")
    for name in ("curves.png", "blocks.png", "scatter.png", "b.png"):
        is_picture(tmp_path / name)


def test_an_unwritable_path(tmp_path):
    with pytest.raises(OSError):
        learning_curves({"a": [1.0]}, tmp_path / "no" / "curves.png", "loss")
