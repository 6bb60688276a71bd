import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import (
    PracticalGroupNorm,
    calibrate,
    feature_statistics,
    measure_gradient_variance,
)
from gnpractical.layers import group_norm_from_name
from gnpractical.num_groups import divisors, practical_num_groups


def block(in_channels, out_channels, name):
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, group_norm_from_name(name, out_channels), nn.ReLU(inplace=True))


def net(name, widths=(3, 24, 16, 24, 16)):
    torch.manual_seed(1)
    blocks = [block(a, b, name) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(5))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def run(model, batch):
    return model(batch[0])


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator))
        for _ in range(count)
    ]


def prepared(name):
    model = net(name)
    model[-1].initialize_parameters(torch.empty(4, 16 * 64))
    return model


def test_the_choice_is_the_candidate_closest_to_one():
    model = block(20, 12, "GN_MEASURED")
    x = torch.randn(4, 20, 6, 6).relu()
    (row,) = calibrate(model, [x], max_passes=1)
    assert list(row.ratios) == list(divisors(12))
    (features,) = feature_statistics(model, [x])
    for num_groups, ratio in row.ratios.items():
        assert ratio == features.gradient_variance_ratio(num_groups)
    assert row.num_groups == min(row.ratios, key=lambda g: abs(math.log(row.ratios[g])))
    assert model[1].num_groups == row.num_groups


def test_measured_is_nearer_to_isometry_than_practical_on_fresh_data():
    def mean_abs_log(model, names):
        rows = measure_gradient_variance(model, batches(2, seed=9), loss)
        return sum(abs(math.log(r.ratio)) for r in rows if r.name in names) / len(names)

    model = prepared("GN_MEASURED")
    rows = calibrate(model, batches(2), run)
    reachable = {
        row.name for row in rows if min(row.ratios.values()) <= 1 <= max(row.ratios.values())
    }
    assert reachable
    assert mean_abs_log(model, reachable) < 0.7 * mean_abs_log(prepared("GN_PRACTICAL"), reachable)


def test_the_same_input_gives_the_same_choice():
    first, second = (calibrate(prepared("GN_MEASURED"), batches(2), run) for _ in range(2))
    assert first == second


def test_only_measured_norms_change():
    model = nn.Sequential(*block(8, 6, "GN_MEASURED"), *block(6, 8, "GN_2"))
    (row,) = calibrate(model, [torch.randn(2, 8, 4, 4)])
    assert row.name == "1" and model[1].num_groups == row.num_groups and model[4].num_groups == 2


@pytest.mark.parametrize("before", [None, 6])
def test_a_failure_leaves_the_model_as_it_was(before):
    model = prepared("GN_MEASURED")
    for module in model.modules():
        if before and isinstance(module, PracticalGroupNorm):
            module.num_groups = before
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third")
        return run(model, batch)

    with pytest.raises(KeyError):
        calibrate(model, batches(2), failing)
    counts = [m.num_groups for m in model.modules() if isinstance(m, PracticalGroupNorm)]
    assert counts == [before] * 4


def test_a_norm_that_does_not_run_gets_the_practical_count(caplog):
    blocks = {"used": block(8, 6, "GN_MEASURED"), "idle": block(64, 32, "GN_MEASURED")}
    model = nn.ModuleDict(blocks)
    rows = calibrate(model, [torch.randn(2, 8, 4, 4)], lambda m, b: m["used"](b))
    assert "1 norms could not be measured" in caplog.text and "idle.1" in caplog.text
    assert rows[1].ratios == {} and rows[1].num_groups == practical_num_groups(64, 32) == 8
    assert model["idle"][1].num_groups == 8


def test_single_values_are_no_candidates():
    # Algorithm 1 would take 24 groups, which cannot run.
    model = nn.Sequential(nn.Linear(512, 24), group_norm_from_name("GN_MEASURED", 24), nn.ReLU())
    (row,) = calibrate(model, [torch.randn(50, 512)])
    assert set(row.ratios) == {1, 2, 3, 4, 6}  # at least 4 values to a group


def test_candidates_run_with_every_call_of_a_shared_head():
    model = block(8, 24, "GN_MEASURED")
    maps = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 1, 1)]
    (row,) = calibrate(model, [maps], lambda m, b: [m(x) for x in b])
    assert set(row.ratios) == {1, 2, 3, 4, 6}
    model(maps[1])


def test_only_the_named_norms_are_chosen():
    model = prepared("GN_MEASURED")
    first, *others = [m for m in model.modules() if isinstance(m, PracticalGroupNorm)]
    for norm in others:
        norm.set_num_groups(8)
    assert [row.name for row in calibrate(model, batches(1), run, only=["0.1"])] == ["0.1"]
    assert first.num_groups and [norm.num_groups for norm in others] == [8, 8, 8]


def test_errors():
    with pytest.raises(ValueError, match="no norm with the rule 'measured'"):
        calibrate(net("GN_PRACTICAL"), batches(1), run)
    lost = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.ModuleList())
    lost[2].append(group_norm_from_name("GN_MEASURED", 10))
    with pytest.raises(ValueError, match="10 channels has the rule 'measured' but no known weight"):
        calibrate(lost, batches(1), run)
    with pytest.raises(ValueError, match="no batches"):
        calibrate(prepared("GN_MEASURED"), [], run)
    with pytest.raises(ValueError, match="max_passes must be at least 1, got 0"):
        calibrate(prepared("GN_MEASURED"), batches(1), run, max_passes=0)
    with pytest.raises(RuntimeError, match=r"\(None, 24, .*measured.*gnpractical\.calibrate"):
        prepared("GN_MEASURED")(torch.randn(1, 3, 8, 8))
