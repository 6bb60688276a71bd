import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import (
    PracticalGroupNorm,
    calibrate,
    convert,
    fold_weight_standardization,
    group_report,
    practical_num_groups,
)
from gnpractical.layers.weight_standardization import WSConv2d


class Functional(nn.Module):
    """Conv and norm in different modules, a functional conv, a gate, a concatenation."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(16)])
        self.gate = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.up_norm = nn.GroupNorm(3, 6)
        self.kernel = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        a = F.relu(self.norms[0](self.convs[0](x)))
        b = self.convs[1](a) + a
        b = b * self.gate(F.adaptive_avg_pool2d(b, 1)).sigmoid()
        b = self.norms[1](b)
        c = self.norms[2](torch.cat([a, b], dim=1))
        c = self.up_norm(self.up(c))
        return self.last(F.conv2d(c, self.kernel))


def fed_by(conversion):
    return {norm.name: (norm.in_channels, *norm.layers) for norm in conversion.norms}


def test_data_flow_through_functional_code():
    conversion = convert(Functional(), torch.randn(2, 3, 8, 8), rule="practical")
    assert fed_by(conversion) == {
        "norms.0": (3, "convs.0"),
        "norms.1": (8, "convs.1"),  # not the gate's, not the shortcut's
        "norms.2": (11, "convs.0", "convs.1"),  # 3 + 8
        "up_norm": (16, "up"),
        "last": (6, "(function)"),
    }
    assert [n.num_groups for n in conversion.norms] == [
        practical_num_groups(i, o) for i, o in [(3, 8), (8, 8), (11, 16), (16, 6), (6, 4)]
    ]


def test_a_norm_before_its_conv_belongs_to_the_one_before():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.norm1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
            self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 16, 1)
            self.norm3 = nn.BatchNorm2d(16)

        def forward(self, x):
            x = self.stem(x)
            return self.norm3(x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu()))

    assert fed_by(convert(PreActivation(), torch.randn(1, 3, 8, 8))) == {
        "norm1": (3, "stem"),
        "norm2": (16, "conv1"),
        "norm3": (4, "conv2"),
    }


def test_affine_values_and_training_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(4, 4)).eval()
    nn.init.normal_(model[1].weight)
    model[1].bias.requires_grad_(False)
    weight = model[1].weight.detach().clone()
    convert(model, rule="practical")
    assert type(model[1]) is PracticalGroupNorm and not model[1].training
    torch.testing.assert_close(model[1].weight.detach(), weight)
    assert model[1].weight.requires_grad and not model[1].bias.requires_grad
    assert [row.norm for row in group_report(model)] == ["GN_PRACTICAL"]


def test_frozen_batch_norms_become_norms_that_do_not_train():
    ops = pytest.importorskip("torchvision").ops
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ops.FrozenBatchNorm2d(8))
    model[1].weight.fill_(2)
    convert(model)
    assert not model[1].weight.requires_grad and model[1].weight.eq(2).all()


def test_a_copy_leaves_the_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8))
    converted = convert(model, inplace=False).model
    assert type(model[1]) is nn.SyncBatchNorm and type(converted[1]) is PracticalGroupNorm


def test_a_norm_shared_by_two_places_stays_shared():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)
    convert(model, torch.randn(1, 8, 4, 4))
    assert model[1] is model[3] and type(model[1]) is PracticalGroupNorm


def test_include_and_exclude():
    model = nn.Sequential(*[nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)) for _ in range(3)])
    conversion = convert(model, include=["0.*", "1.*"], exclude=["1.*"])
    assert [bool(norm.skipped_reason) for norm in conversion.norms] == [False, True, True]
    assert "not chosen" in str(conversion) and "1 of 3 norms converted" in str(conversion)


def unpaired():
    return nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))


@pytest.mark.parametrize("example", [None, torch.randn(2, 6, 4, 4)])
def test_norms_without_a_layer_follow_the_policy(example):
    model = unpaired()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1 norms could not be paired.*0 \(BatchNorm2d, 6 chann"):
        convert(model, example, rule="practical")
    assert type(model[2]) is nn.BatchNorm2d and model.state_dict().keys() == before.keys()
    kept = convert(unpaired(), example, on_unpaired="keep", rule="practical")
    assert type(kept.model[0]) is nn.BatchNorm2d and kept.norms[0].skipped_reason
    fixed = convert(unpaired(), example, on_unpaired=3, rule="practical")
    assert fixed.model[0].num_groups == 3 and fixed.model[2].num_groups == 1
    with pytest.raises(ValueError, match="0: 4 groups do not divide 6"):
        convert(unpaired(), example, on_unpaired=4, rule="practical")


def test_calls_after_layers_of_different_widths_are_ambiguous():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 8), nn.Linear(5, 8), nn.BatchNorm1d(8)

        def forward(self, x, y):
            return self.norm(self.a(x)) + self.norm(self.b(y))

    with pytest.raises(ValueError, match="different input widths"):
        convert(Shared(), (torch.randn(2, 3), torch.randn(2, 5)))
    with pytest.raises(ValueError, match="could not be paired"):
        convert(Shared())


def test_too_few_values_to_a_group_are_avoided_where_they_are_seen():
    def pooling():
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(256, 32, 1), nn.BatchNorm2d(32), nn.ReLU()
        )

    conversion = convert(pooling(), torch.randn(2, 256, 8, 8), rule="practical")
    assert conversion.norms[0].limited_from == 32 and conversion.norms[0].num_groups == 8
    assert "limited from G=32" in str(conversion)
    conversion.model(torch.randn(2, 256, 8, 8)).pow(3).sum().backward()
    assert conversion.model[1].weight.grad.abs().max() > 1e-6
    assert convert(pooling(), rule="practical").norms[0].num_groups == 32


def test_measured_and_weight_standardization():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )
    x = torch.randn(2, 3, 9, 9)
    convert(model, x, rule="measured", weight_standardization=True)
    assert [type(m) for m in (model[0], model[3], model[6])] == [WSConv2d, WSConv2d, nn.Conv2d]
    rows = calibrate(model, [x])
    assert [row.num_groups for row in rows] == [model[1].num_groups, model[4].num_groups]
    before = model(x)
    assert fold_weight_standardization(model) == 2
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide_first", [False, True])
def test_a_norm_after_a_sum_gets_the_same_count_whichever_branch_ran_first(wide_first):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 256, 1)
            self.wide, self.narrow = nn.Conv2d(256, 128, 1), nn.Conv2d(64, 128, 1)
            self.norm = nn.BatchNorm2d(128)

        def forward(self, x):
            x = self.stem(x)
            branches = [lambda: self.wide(x), lambda: self.narrow(x[:, :64])]
            a, b = [branch() for branch in branches[:: 1 if wide_first else -1]]
            return self.norm(a + b)

    model = Sum()
    convert(model, torch.randn(2, 3, 8, 8))
    assert (model.norm.in_channels, model.norm.num_groups) == (256, 32)


def test_by_default_four_channels_make_a_group():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
    )
    assert [norm.num_groups for norm in convert(model).norms] == [2, 2]
    assert model[1].rule == "cpg_4"
