"""Every argument of the public functions with values of all kinds: a result, or a clear error."""

import copy
import math
import time

import pytest
import torch
from torch import nn

import gnpractical as g
from gnpractical.gradient_law import distinctness_gain, norm_factor
from gnpractical.layers import group_norm_from_name

VALUES = [
    *(None, True, False, 0, -1, 3, 1.5, 10**30, -(10**30), math.nan, math.inf, -math.inf, 1j),
    *("", "x", "32", b"x", [], [1], (), (1, 2), {}, {"a": 1}, set(), range(3), object, print),
    *(torch.zeros(()), torch.zeros(2, 3), torch.zeros(2, 3, 8, 8), torch.tensor(math.nan)),
    nn.ReLU(),
]
CLEAR = (ValueError, TypeError, RuntimeError)


def model():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(
        conv, nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6)
    )


def measured():
    norm = group_norm_from_name("GN_MEASURED", 8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm)


X = torch.randn(2, 3, 8, 8)
ZEROS, ONES = torch.zeros(8), torch.ones(8)
CALLS = {
    "practical_num_groups": (
        g.practical_num_groups,
        {"in_channels": 64, "out_channels": 32, "rule": "practical", "gain_ratio": 1.0},
    ),
    "ideal_num_groups": (
        g.ideal_num_groups,
        {"in_channels": 64, "out_channels": 32, "gain_ratio": 1.0},
    ),
    "gradient_variance_ratio": (
        g.gradient_variance_ratio,
        {
            "in_channels": 64,
            "out_channels": 32,
            "num_groups": 4,
            "law": "exact",
            "mean_share": 0.5,
            "positions": 9,
            "gain_ratio": 1.0,
            "stride": 1,
        },
    ),
    "norm_factor": (norm_factor, {"channels_per_group": 8, "mean_share": 0.5, "positions": 9}),
    "distinctness_gain": (distinctness_gain, {"channels_per_group": 8, "mean_share": 0.5}),
    "activation_gain": (g.activation_gain, {"name": "relu", "sigma": 1.0}),
    "PracticalGroupNorm": (
        g.PracticalGroupNorm,
        {"num_channels": 32, "in_channels": 64, "rule": "practical", "eps": 1e-5},
    ),
    "convert": (
        g.convert,
        {
            "model": model,
            "example_inputs": X,
            "rule": "practical",
            "include": ["*"],
            "exclude": [],
            "on_unpaired": "error",
            "weight_standardization": False,
        },
    ),
    "match_norms": (
        g.match_norms,
        {
            "model": model,
            "batches": [X],
            "run": None,
            "targets": {"1": (ZEROS, ONES)},
            "only": ["1"],
        },
    ),
    "norm_targets": (g.norm_targets, {"original": model, "batches": [X], "run": None}),
    "feature_statistics": (g.feature_statistics, {"model": model, "batches": [X], "run": None}),
    "calibrate": (
        g.calibrate,
        {"model": measured, "batches": [X], "run": None, "only": None, "max_passes": 2},
    ),
    "measure_gradient_variance": (
        g.measure_gradient_variance,
        {"model": model, "batches": [X], "loss": lambda m, x: m(x).square().sum()},
    ),
    "resolve_norms": (g.resolve_norms, {"model": model, "example_inputs": X}),
    "group_report": (g.group_report, {"model": model}),
    "fold_weight_standardization": (g.fold_weight_standardization, {"model": model}),
}


@pytest.mark.parametrize(
    "name, argument", [(name, argument) for name, (_, args) in CALLS.items() for argument in args]
)
def test_a_result_or_a_clear_error(name, argument):
    function, arguments = CALLS[name]
    for value in VALUES:
        given = {k: v() if v in (model, measured) else v for k, v in arguments.items()}
        start = time.perf_counter()
        try:
            function(**given | {argument: copy.copy(value) if callable(value) else value})
        except CLEAR as e:
            assert str(e), f"{argument}={value!r}"
        except Exception as e:
            pytest.fail(f"{name}({argument}={value!r}): {type(e).__name__}: {e}")
        assert time.perf_counter() - start < 5, f"{argument}={value!r}"
