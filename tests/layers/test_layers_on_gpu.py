"""Norms, standardization, conversion and measurements as they are on a CPU."""

import copy

import pytest
import torch
from torch import nn

from gnpractical import (
    PracticalGroupNorm,
    calibrate,
    convert,
    group_report,
    match_norms,
    measure_gradient_variance,
)
from gnpractical.layers.weight_standardization import apply_weight_standardization

pytestmark = pytest.mark.gpu

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def net(norm=nn.BatchNorm2d):
    widths = [3, 16, 32, 8]
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), norm(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = net()
    convert(model)
    assert len(apply_weight_standardization(model, ["0", "3", "6"])) == 3
    return model


def output_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_near(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4, 16, 32])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 4e-2)]
)
def test_a_norm_against_float64_on_the_cpu(gpu, layout, groups, dtype, tolerance):
    x = 3 + 2 * torch.randn(2, 32, 25, 42, dtype=torch.float64)
    norm = PracticalGroupNorm(32, rule=groups, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    results = []
    for place, kind in (("cpu", torch.float64), (gpu, dtype)):
        here = copy.deepcopy(norm).to(place, kind)
        maps = x.to(place, kind, copy=True).contiguous(memory_format=layout).requires_grad_()
        y = here(maps)
        (y.double() ** 3).sum().backward()
        results.append([y, maps.grad, here.weight.grad, here.bias.grad])
    assert_near(results[1], results[0], tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_net_is_the_same(gpu, model, layout):
    x = torch.randn(4, 3, 24, 24)
    wanted = output_and_gradients(model.double(), x.double())
    model.to(gpu, memory_format=layout)
    maps = x.double().to(gpu).contiguous(memory_format=layout)
    assert_near(output_and_gradients(model, maps), wanted, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(gpu, model, dtype):
    x = torch.randn(4, 3, 24, 24)
    wanted = output_and_gradients(model, x)
    model.to(gpu)
    with torch.autocast(gpu, dtype=dtype):
        found = output_and_gradients(model, x.to(gpu))
    assert all(each.isfinite().all() for each in found)
    assert_near(found[:1], wanted[:1], 0.05)


def test_compiled(gpu, model):
    model.to(gpu)
    x = torch.randn(4, 3, 24, 24, device=gpu)
    wanted = output_and_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    assert_near(output_and_gradients(compiled, x), wanted, 1e-3)


def test_in_a_cuda_graph(gpu, model):
    if gpu == "cpu":
        pytest.skip("graphs are CUDA's")
    model.to(gpu)
    x = torch.randn(4, 3, 24, 24, device=gpu)
    wanted = output_and_gradients(model, x)
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(x),))
    assert_near(output_and_gradients(graphed, x), wanted, 1e-4)


def test_matching(gpu):
    batch_norms = net()
    x = [torch.randn(4, 3, 24, 24) for _ in range(2)]
    with torch.no_grad():
        for each in x:
            batch_norms(each)
    weights = {}
    for place in ("cpu", gpu):
        model = copy.deepcopy(batch_norms)
        convert(model)
        model.to(place)
        rows = match_norms(model, [each.to(place) for each in x])
        assert not any(row.skipped_reason for row in rows)
        weights[place] = [norm.weight for norm in model if isinstance(norm, nn.GroupNorm)]
    assert_near(weights[gpu], weights["cpu"], 1e-3)


def test_calibration_and_measured_gradients(gpu):
    x = torch.randn(4, 3, 24, 24)
    counts, ratios = {}, {}
    for place in ("cpu", gpu):
        torch.manual_seed(0)
        model = net()
        convert(model, rule="measured")
        model.to(place)
        calibrate(model, [x.to(place)])
        counts[place] = [row.num_groups for row in group_report(model)]
        rows = measure_gradient_variance(model, [x.to(place)], lambda m, b: m(b).square().sum())
        ratios[place] = torch.tensor([row.input_variance / row.output_variance for row in rows])
    assert counts[gpu] == counts["cpu"]
    assert_near([ratios[gpu]], [ratios["cpu"]], 1e-2)
