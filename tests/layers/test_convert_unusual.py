"""Conversion of what is rare: products with parameters, shared norms, a layer that is the model."""

import pytest
import torch
from torch import nn

from gnpractical import PracticalGroupNorm, convert, group_report
from gnpractical.layers.weight_standardization import WSConv2d


def test_a_product_with_a_parameter_is_a_layer_of_unknown_widths():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = nn.Conv1d(16, 64, 1), nn.Parameter(torch.randn(64, 64))
            self.norm = nn.GroupNorm(8, 64)

        def forward(self, x):
            return self.norm(torch.einsum("oc,nct->not", self.weight, self.conv(x)))

    with pytest.raises(ValueError, match=r"norm \(GroupNorm, 64 channels\): .*not known"):
        convert(Product(), torch.randn(2, 16, 5))


def test_a_norm_shared_behind_layers_that_do_not_agree_is_unpaired():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(64, 8, 1), norm), nn.Sequential(nn.Conv2d(8, 8, 1), norm)
    )
    with pytest.raises(ValueError, match="1 norms could not be paired"):
        convert(model)


def test_all_layers_of_a_shared_norm_are_standardized_and_stay_so_in_another_conversion():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), norm)
    convert(model, torch.randn(1, 8, 9, 9), weight_standardization=True)
    assert type(model[0]) is type(model[3]) is WSConv2d
    (row,) = convert(model, rule=2).norms
    assert (row.in_channels, row.layers) == (8, ("0", "3"))


def test_a_convolution_that_is_the_whole_model():
    class ConvWithNorm(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(super().forward(x))

    model = ConvWithNorm()
    assert convert(model, torch.randn(1, 3, 8, 8)).norms[0].layers == ("",)
    assert group_report(model)[0].in_channels == 3
    assert [row.flags for row in group_report(PracticalGroupNorm(8))] == ["unresolved"]


def test_one_pattern_needs_no_list():
    model = nn.Sequential(*[nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)) for _ in range(2)])
    rows = convert(model, include="0.*").norms
    assert [bool(row.skipped_reason) for row in rows] == [False, True]


def test_lazy_modules_are_converted_as_what_they_become():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    model(torch.randn(1, 5, 8, 8))
    assert convert(model, torch.randn(1, 5, 8, 8)).norms[0].in_channels == 5
