"""What convert refuses, with what words, and that the model is then as it was."""

import warnings

import pytest
import torch
from torch import nn

from gnpractical import PracticalGroupNorm, convert

SMALL = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    "model, kwargs, message",
    [
        (nn.Linear(3, 3), {}, "Linear has no BatchNorm or GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), {}, "Sequential has no BatchNorm or"),
        (SMALL, {"rule": "best"}, "rule must be one of"),
        (SMALL, {"on_unpaired": "guess"}, "on_unpaired must be 'error', 'keep'"),
        (SMALL, {"on_unpaired": 0}, "on_unpaired must be at least 1"),
        ("resnet50", {}, "model must be a module that is not scripted, got str"),
    ],
)
def test_bad_arguments(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert(model, **kwargs)


class Scaled(nn.Module):
    """Two inputs, and an opinion about them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x, scale):
        assert scale["by"] > 0
        return self.norm(self.conv(x)) * scale["by"]


def snapshot(model):
    return (
        [(name, type(m), m.training) for name, m in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        {name: value.tolist() for name, value in model.state_dict().items()},
    )


IMAGES, SCALE = torch.ones(2, 6, 4, 4), {"by": 2.0}


@pytest.mark.parametrize(
    "example, arrived, reason",
    [
        (IMAGES, r"Tensor, tensors of shape \[\(2, 6, 4, 4\)\]", "TypeError.* 'scale'"),
        ((IMAGES,), r"tuple, tensors of shape \[\(2, 6, 4, 4\)\]", "TypeError.* 'scale'"),
        ([IMAGES, SCALE], "list, tensors", "TypeError.* 'scale'"),  # one argument, a list
        ((IMAGES, SCALE, 1), "tuple, tensors", "TypeError.* takes 3"),
        ({"images": IMAGES}, "dict, tensors", "TypeError.*'images'"),
        ((IMAGES[:, :5], SCALE), r"\(2, 5, 4, 4\)", "RuntimeError.*6 channels, but got 5"),
        ((IMAGES.long(), SCALE), r"\(2, 6, 4, 4\)", "RuntimeError.*type"),
        ((IMAGES.to("meta"), SCALE), r"\(2, 6, 4, 4\)\]", "RuntimeError.*device"),
        ((IMAGES, {}), "tuple, tensors", "KeyError: 'by'"),
        ((IMAGES, {"by": -1}), "tuple, tensors", "AssertionError"),
        ("image.png", r"str, tensors of shape \[\]\)", "TypeError"),
    ],
)
def test_example_inputs_that_the_model_cannot_run_on(example, arrived, reason):
    model = Scaled()
    before = snapshot(model)
    todo = r"\. Its forward takes \(x, scale\); give a tensor, a tuple of positional"
    with pytest.raises(ValueError, match=f"Scaled cannot run on .*{arrived}.*{reason}.*{todo}"):
        convert(model, example)
    assert snapshot(model) == before
    for good in ((IMAGES, SCALE), {"x": IMAGES, "scale": SCALE}):
        assert convert(Scaled(), good).norms[0].layers == ("conv",)


def test_norms_outside_any_module_with_a_weight_layer():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.idle = nn.Conv2d(6, 8, 1), nn.ModuleList([nn.BatchNorm2d(8)])

        def forward(self, x):
            return self.conv(x)

    for example in (None, IMAGES):
        model = Outside()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"idle\.0 \(BatchNorm2d, 8 channels\): no layer befo"):
            convert(model, example)
        assert snapshot(model) == before
        with pytest.raises(ValueError, match=r"model \(BatchNorm2d, 6 channels\): "):
            convert(nn.BatchNorm2d(6), example)
        assert convert(nn.BatchNorm2d(6), example, on_unpaired=2).model.num_groups == 2


def test_scripted_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch advise against it
        scripted = torch.jit.script(SMALL)
    with pytest.raises(ValueError, match="must be a module that is not scripted, got Recursive"):
        convert(scripted, IMAGES)
    assert not isinstance(scripted[1], PracticalGroupNorm)
