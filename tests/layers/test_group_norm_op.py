import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from gnpractical import PracticalGroupNorm, measure_gradient_variance
from gnpractical.layers import group_norm_op
from gnpractical.layers.group_norm_op import group_norm

LARGE = (2, 64, 16, 16)  # where the operator is chosen on channels_last maps


def operator(input, num_groups, weight, bias, eps=1e-5, relu=False):
    return torch.ops.gnpractical.group_norm(input, num_groups, weight, bias, eps, relu)[0]


def function(input, num_groups, weight, bias, eps=1e-5, relu=False):
    return group_norm_op._GroupNorm.apply(input, num_groups, weight, bias, eps, relu)


def channels_last(*shape, **kwargs):
    return torch.randn(shape, **kwargs).contiguous(memory_format=torch.channels_last)


def affine(channels, dtype=torch.float32):
    return [torch.randn(channels, dtype=dtype).requires_grad_() for _ in range(2)]


INPUTS = {
    "contiguous": torch.randn(2, 12, 5, 7),
    "channels_last": channels_last(2, 12, 5, 7),
    "one image": channels_last(1, 12, 3, 3),
    "one position": channels_last(3, 12, 1, 1),
    "odd channels": channels_last(2, 15, 4, 3),
    "one channel": channels_last(2, 1, 4, 3),
    "a slice": channels_last(2, 12, 9, 7)[:, :, ::2],
    "expanded": torch.randn(2, 12, 1, 7).expand(-1, -1, 5, -1),
    "vectors": torch.randn(5, 12),
    "sequences": torch.randn(2, 12, 9),
    "volumes": torch.randn(2, 12, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
    "no images": channels_last(0, 12, 5, 7),
    "double": channels_last(2, 12, 5, 7, dtype=torch.double),
    "half": channels_last(2, 12, 5, 7).half(),
    "bfloat16": channels_last(2, 12, 5, 7).bfloat16(),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", [operator, function])
@pytest.mark.parametrize("name", INPUTS)
def test_equals_pytorchs(name, kind, relu):
    x = INPUTS[name].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    channels = x.shape[1]
    weight, bias = affine(channels, torch.promote_types(x.dtype, torch.float32))
    tolerance = {"half": 1e-2, "bfloat16": 5e-2}.get(name, 1e-4)
    for num_groups in (g for g in range(1, channels + 1) if channels % g == 0):
        if name in ("one position", "vectors") and num_groups == channels:
            continue  # F.group_norm's gradient of nothing but rounding
        inputs = (x, weight, bias)
        y = kind(x, num_groups, weight, bias, relu=relu)
        exact = [each.detach().double().requires_grad_() for each in inputs]
        expected = torch.group_norm(exact[0], num_groups, *exact[1:])
        expected = expected.relu() if relu else expected
        grad = torch.randn_like(y)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(y, inputs, grad)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=10 * tolerance, atol=10 * tolerance
            )


@pytest.mark.parametrize("kind", [operator, function])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_gradients_in_float64(kind, num_groups):
    x = channels_last(2, 8, 3, 2, dtype=torch.double).requires_grad_()
    inputs = (x, *affine(8, torch.double))
    assert torch.autograd.gradcheck(lambda x, w, b: kind(x, num_groups, w, b), inputs)
    assert torch.autograd.gradcheck(lambda x, w, b: kind(x, num_groups, w, b, relu=True), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w, b: kind(x, num_groups, w, b), inputs)


@pytest.mark.parametrize("name", ["channels_last", "contiguous", "a slice", "no images", "half"])
@pytest.mark.parametrize("with_affine", [False, True])
def test_operator_is_registered_in_full(name, with_affine):
    x = INPUTS[name].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias = affine(12) if with_affine else (None, None)
    results = torch.library.opcheck(
        torch.ops.gnpractical.group_norm, (x, 4, weight, bias, 1e-5, with_affine)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_keeps_channels_last():
    x = channels_last(*LARGE).requires_grad_()
    y = group_norm(x, 64, *affine(64))
    y.sum().backward()
    for each in (y, x.grad):
        assert each.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [operator, function])
def test_output_may_be_overwritten(kind):
    x = channels_last(*LARGE).requires_grad_()
    F.relu_(kind(x, 64, *affine(64))).sum().backward()
    assert x.grad is not None


def test_mean_far_above_the_deviation():
    x = channels_last(*LARGE) + 1000
    expected = F.group_norm(x.double(), 64)
    torch.testing.assert_close(group_norm(x, 64, None, None).double(), expected, rtol=0, atol=5e-3)


def is_ours(y):
    return "_GroupNorm" in type(y.grad_fn).__name__


@pytest.mark.parametrize(
    ("x", "num_groups", "ours"),
    [
        (channels_last(*LARGE), 64, True),
        (channels_last(*LARGE), 32, True),
        (channels_last(*LARGE), 16, False),
        (channels_last(2, 64, 4, 4), 64, False),
        (torch.randn(LARGE), 64, False),
        (channels_last(*LARGE).bfloat16(), 64, False),
    ],
    ids=["G=C", "G=C/2", "G=C/4", "small", "contiguous", "bfloat16"],
)
def test_chosen_where_it_is_faster(x, num_groups, ours):
    norm = PracticalGroupNorm(64, 64, num_groups).to(x.dtype)
    y = norm(x.requires_grad_())
    assert is_ours(y) == ours
    torch.testing.assert_close(y, F.group_norm(x, num_groups, norm.weight, norm.bias))


def test_what_pytorch_refuses_is_refused():
    norm = PracticalGroupNorm(64, 64, 64)
    with pytest.raises(ValueError, match=r"64 groups.*\(2, 128, 16, 16\).*\(64,\), \(64,\)"):
        norm(channels_last(2, 128, 16, 16))
    with pytest.raises(ValueError, match=r"5 groups.*\(2, 64, 16, 16\)"):
        operator(channels_last(*LARGE), 5, None, None)
    with pytest.raises(TypeError, match="float64.*float32"):
        norm(channels_last(*LARGE).double())


def test_gradients_of_the_gradient_where_the_affine_depends_on_the_input():
    def gradient(norm, create_graph):
        x = channels_last(*LARGE, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        weight = x.mean((0, 2, 3)) + 1
        y = norm(x, 32, weight, weight)
        return torch.autograd.grad(y.pow(3).sum(), x, create_graph=create_graph)[0]

    expected = gradient(torch.group_norm, False)
    for create_graph in (False, True):
        torch.testing.assert_close(gradient(group_norm, create_graph), expected)


def test_function_transforms():
    norm = PracticalGroupNorm(64, 64, 64)
    x, tangent = channels_last(*LARGE), channels_last(*LARGE)

    def transforms(norm):
        yield torch.func.vmap(norm)(torch.stack([x, tangent]))
        yield torch.func.grad(lambda x: norm(x).pow(3).sum())(x)
        yield torch.func.jvp(norm, (x,), (tangent,))[1]
        yield make_fx(norm)(x)(x)

    plain = nn.GroupNorm(64, 64)
    for one, other in zip(transforms(norm), transforms(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_export_with_dynamic_shapes():
    norm = PracticalGroupNorm(64, 64, 64).eval()
    n, side = torch.export.Dim("n", max=64), torch.export.Dim("side", min=2, max=512)
    shapes = ({0: n, 2: side, 3: side},)
    exported = torch.export.export(norm, (channels_last(2, 64, 8, 8),), dynamic_shapes=shapes)
    x = channels_last(9, 64, 40, 40)
    torch.testing.assert_close(exported.module()(x), norm(x), rtol=1e-4, atol=1e-4)


def test_graphs_hold_pytorchs_operator():
    x = channels_last(*LARGE)
    norm = PracticalGroupNorm(64, 64, 64).eval()
    expected = F.group_norm(x, 64)
    for exported in (torch.export.export(norm, (x,)), torch.export.export(norm, (x,), strict=True)):
        names = [str(node.target) for node in exported.graph.nodes]
        assert any("aten.group_norm" in name for name in names)
        assert not any("gnpractical" in name for name in names)
    traced = torch.jit.trace(norm, x)
    assert "aten::group_norm" in str(traced.inlined_graph)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for form in (traced, torch.jit.script(norm), compiled):
        torch.testing.assert_close(form(x), expected)


class Residual(nn.Module):
    def __init__(self, num_groups):
        super().__init__()
        self.conv1 = nn.Conv2d(64, 64, 3, padding=1)
        self.norm1 = PracticalGroupNorm(64, rule=num_groups)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.norm2 = PracticalGroupNorm(64, rule=num_groups)

    def forward(self, x):
        x = x + F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))  # norm2's layer is fed by an addition


@pytest.mark.parametrize("num_groups", [8, 64])
def test_measured_gradients_are_those_of_contiguous_maps(num_groups):
    torch.manual_seed(0)
    model = Residual(num_groups).to(memory_format=torch.channels_last)
    contiguous = torch.randn(2, 64, 16, 16)
    rows = [
        measure_gradient_variance(model, [x], lambda model, x: model(x).pow(3).mean())
        for x in (contiguous, contiguous.contiguous(memory_format=torch.channels_last))
    ]
    assert [row.layer for row in rows[0]] == ["conv1", "conv2"]
    for one, other in zip(*rows, strict=True):
        assert one.layer == other.layer and one.activation == other.activation == "relu"
        assert one.output_variance == pytest.approx(other.output_variance, rel=1e-3)
        assert one.input_variance == pytest.approx(other.input_variance, rel=1e-3)
