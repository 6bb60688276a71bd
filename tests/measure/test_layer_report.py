import pytest
from torch import nn

from gnpractical import PracticalGroupNorm, format_report, group_report
from gnpractical.layers.weight_standardization import WSConv2d


def toy():
    model = nn.Sequential(
        nn.Sequential(WSConv2d(256, 128, 1), PracticalGroupNorm(128)),
        nn.Sequential(nn.Conv2d(128, 128, 1), PracticalGroupNorm(128)),
        nn.Sequential(nn.Conv2d(128, 16, 1), PracticalGroupNorm(16)),
        nn.Sequential(nn.Conv2d(16, 48, 1), nn.GroupNorm(4, 48)),
        nn.GroupNorm(2, 48),
        nn.BatchNorm2d(48),
    )
    model[2].requires_grad_(False)
    return model


def test_rows():
    rows = group_report(toy())
    assert [r.name for r in rows] == ["4", "0.1", "1.1", "2.1", "3.1"]
    lone, first, second, third, stock = rows
    assert (first.in_channels, first.out_channels, first.num_groups) == (256, 128, 32)
    assert (first.ideal, first.ratio, first.ratio_32) == (32, 1, 1)
    assert first.ratio_1 == pytest.approx(132 / 256)
    assert (second.num_groups, second.ratio, second.ratio_32) == (1, 1.03125, 2)
    assert (third.num_groups, third.ideal, third.ratio_32) == (16, 28, None)
    assert (stock.norm, stock.in_channels, stock.num_groups) == ("GN_4", 16, 4)
    assert (lone.in_channels, lone.ratio, lone.ideal) == (None, None, None)


def test_flags():
    flags = {r.name: r.flags for r in group_report(toy())}
    assert flags == {"0.1": "WS", "1.1": "G=1", "2.1": "G=C frozen", "3.1": "", "4": ""}


def test_unresolved_norms_are_shown_as_such():
    (row,) = group_report(nn.ModuleList([PracticalGroupNorm(8)]))
    assert (row.num_groups, row.flags) == (None, "unresolved")
    assert "unresolved" in format_report([row])


def test_a_width_that_was_given_is_the_one_reported():
    model = nn.Sequential(nn.Conv2d(256, 128, 1), PracticalGroupNorm(128, in_channels=512))
    assert group_report(model)[0].in_channels == 512


def test_table_and_totals():
    text = format_report(group_report(toy()))
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer",
        "in",
        "out",
        "G_ideal",
        "G",
        "K(G)",
        "K(1)",
        "K(32)",
        "norm",
        "flags",
    ]
    row = next(line.split() for line in lines if line.startswith("0.1"))
    assert row == ["0.1", "256", "128", "32", "32", "1.00", "0.52", "1.00", "GN_PRACTICAL", "WS"]
    assert lines[-1] == (
        "5 GroupNorm layers: G=1 in 1, G=C in 1, frozen 1; G: 1 x1, 2 x1, 4 x1, 16 x1, 32 x1"
    )


def test_model_without_group_norm():
    assert group_report(nn.Linear(2, 2)) == []
    assert format_report([]) == "The model has no GroupNorm layers."
