import pytest
import torch
from torch import nn

from gnpractical import PracticalGroupNorm, convert, group_report, resolve_norms
from gnpractical.layers.pairing import require_resolved


class Lists(nn.Module):
    """Norms in a list of their own, as Res2Net and CenterNet have them."""

    def __init__(self, rule="practical"):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 1)
        self.convs = nn.ModuleList([nn.Conv2d(64, 32, 1), nn.Conv2d(32, 8, 3, padding=1)])
        self.norms = nn.ModuleList([PracticalGroupNorm(32, rule=rule), PracticalGroupNorm(8)])
        self.idle = nn.ModuleList()

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return x


def test_norms_in_lists_get_the_numbers_of_their_rules():
    model, x = Lists(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="2 norms .*norms.0.*norms.1.*resolve_norms"):
        require_resolved(model)
    with pytest.raises(RuntimeError, match="Call gnpractical.resolve_norms"):
        model(x)
    assert resolve_norms(model, x) == {"norms.0": 8, "norms.1": 8}
    assert [(n.in_channels, n.num_groups) for n in model.norms] == [(64, 8), (32, 8)]
    assert {row.name: row.in_channels for row in group_report(model)} == {
        "norms.0": 64,
        "norms.1": 32,
    }
    require_resolved(model)
    assert model(x).shape == (2, 8, 8, 8)
    assert resolve_norms(model, x) == {}


def test_measured_norms_learn_their_layer():
    model = Lists("measured")
    assert resolve_norms(model, torch.randn(2, 3, 8, 8)) == {"norms.0": None, "norms.1": 8}
    require_resolved(model)


def test_convert_takes_models_with_such_norms():
    model = Lists()
    convert(model, torch.randn(2, 3, 8, 8), rule="cpg_4")
    assert [n.num_groups for n in model.norms] == [8, 2]


def test_norms_that_do_not_run_are_named_and_nothing_changes():
    model = Lists()
    model.idle.append(PracticalGroupNorm(4))
    with pytest.raises(ValueError, match="1 norms have no one layer: idle.0: no layer before it"):
        resolve_norms(model, torch.randn(2, 3, 8, 8))
    assert all(norm.num_groups is None for norm in (*model.norms, *model.idle))
    with pytest.raises(ValueError, match="cannot run on the example inputs"):
        resolve_norms(model, torch.randn(2, 5, 8, 8))
    assert all(norm.num_groups is None for norm in (*model.norms, *model.idle))
