"""Conversion, group report, record and weight standardization agree on which layers feed a norm."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gnpractical import convert, group_report
from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.weight_standardization import WSConv2d, apply_weight_standardization
from gnpractical.runs.group_record import differing_norms, group_record, take_recorded

IMAGES = torch.randn(1, 3, 8, 8)


class PreActivation(nn.Module):
    """The norm in front of its conv: what feeds it is in the module before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(*[self.block(16) for _ in range(2)])
        self.norm = nn.BatchNorm2d(16)

    @staticmethod
    def block(width):
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return self.norm(self.blocks(self.stem(x)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x):
        return self.norm(torch.cat([self.a(x), self.b(x)], 1))


FED_BY = {
    PreActivation: {"norm": ["blocks.1.2"], "blocks.0.0": ["stem"], "blocks.1.0": ["blocks.0.2"]},
    Concatenated: {"norm": ["a", "b"]},
}


@pytest.mark.parametrize("cls", list(FED_BY))
def test_the_flag_of_weight_standardization_follows_the_data(cls):
    model = cls()
    conversion = convert(model, IMAGES, weight_standardization=True)
    assert {n.name: list(n.layers) for n in conversion.norms} == FED_BY[cls]
    assert all(isinstance(m, WSConv2d) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert {p.norm_name: list(p.layers) for p in find_pairs(model)} == FED_BY[cls]
    assert all(row.weight_standardized for row in group_report(model))
    assert all(entry["weight_standardized"] for entry in group_record(model).values())
    plain = convert(cls(), IMAGES).model
    assert set(differing_norms(plain, group_record(model))) == set(FED_BY[cls])
    assert (
        differing_norms(
            convert(cls(), IMAGES, weight_standardization=True).model, group_record(model)
        )
        == []
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_their_own_layers(copied):
    model = convert(PreActivation(), IMAGES, weight_standardization=True).model
    other = copied(model)
    for mine, theirs in zip(find_pairs(model), find_pairs(other), strict=True):
        assert mine.layers.keys() == theirs.layers.keys()
        assert all(layer in set(other.modules()) for layer in theirs.layers.values())


def test_standardizing_afterwards_goes_by_the_same_answer():
    model = convert(PreActivation(), IMAGES).model
    assert apply_weight_standardization(model, ["stem"]) == ["stem"]
    assert {r.name for r in group_report(model) if r.weight_standardized} == {"blocks.0.0"}


def test_layers_that_are_gone_are_looked_for_by_structure():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    convert(model, IMAGES)
    model[0] = WSConv2d(3, 8, 1)
    assert [list(pair.layers) for pair in find_pairs(model)] == [["0"]]
    assert group_report(model)[0].weight_standardized


def test_a_converted_model_is_converted_again_without_examples():
    model = convert(Concatenated(), IMAGES).model
    (norm,) = convert(model, rule=4).norms
    assert (norm.in_channels, norm.layers, norm.num_groups) == (6, ("a", "b"), 4)


def test_what_norms_were_matched_from_is_taken_over_where_they_agree():
    model = convert(PreActivation(), IMAGES, rule=4).model
    for name in ("norm", "blocks.0.0"):
        model.get_submodule(name).matched_from = "BatchNorm2d"
    record = group_record(model)
    other = convert(PreActivation(), IMAGES, rule=4).model
    other.norm.num_groups = 2
    take_recorded(other, record)
    assert {r.name: r.matched_from for r in group_report(other) if r.matched_from} == {
        "blocks.0.0": "BatchNorm2d"
    }
