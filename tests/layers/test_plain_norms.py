import copy

import pytest
import torch
from torch import nn

from gnpractical import PracticalGroupNorm, convert, to_group_norm
from gnpractical.layers.plain_norms import OneGroupNorm
from gnpractical.layers.weight_standardization import WSConv2d


def model(weight_standardization=True):
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 32, 3), nn.GroupNorm(4, 32)),
    )
    convert(
        net,
        torch.randn(1, 3, 16, 16),
        rule="practical",
        weight_standardization=weight_standardization,
    )
    for norm in (m for m in net.modules() if isinstance(m, PracticalGroupNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    assert [m.num_groups for m in net if isinstance(m, PracticalGroupNorm)] == [1, 1, 8]
    return net.eval()


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("weight_standardization", [False, True])
def test_the_same_function_by_plain_modules(decompose, weight_standardization):
    net = model(weight_standardization)
    plain = copy.deepcopy(net)
    assert to_group_norm(plain, decompose_layer_norm=decompose) == 3
    types = [type(m) for m in plain if isinstance(m, nn.GroupNorm)]
    one = OneGroupNorm if decompose else nn.GroupNorm
    assert types == [one, one, nn.GroupNorm]
    assert not any(isinstance(m, WSConv2d) for m in plain)
    assert plain.state_dict().keys() == net.state_dict().keys()
    x = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(plain(x), net(x), rtol=1e-5, atol=1e-5)
    assert not vars(plain[-1]).keys() - vars(nn.GroupNorm(1, 1)).keys()


def test_gradients_and_modes_are_kept():
    net = model(weight_standardization=False).train()
    net[1].weight.requires_grad_(False)
    plain = copy.deepcopy(net)
    to_group_norm(plain, decompose_layer_norm=True)
    assert plain.training and not plain[1].weight.requires_grad
    x = torch.randn(2, 3, 16, 16)
    for each in (net, plain):
        (each(x) ** 2).mean().backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 2, 3, 4)])
def test_one_group_written_out(shape, affine):
    norm = nn.GroupNorm(1, 6, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = 3 * torch.randn(shape) + 100  # a mean far from zero
    wanted = norm(x)
    assert to_group_norm(norm, decompose_layer_norm=True) == 1
    torch.testing.assert_close(norm(x), wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_single():
    norm = nn.GroupNorm(1, 8)
    to_group_norm(norm, decompose_layer_norm=True)
    x = 300 * torch.randn(1, 8, 64, 64)  # whose squares half precision cannot hold
    half = norm.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), norm.float()(x), rtol=1e-2, atol=1e-2)


def test_a_norm_in_two_places_and_hooks_stay():
    net = model()
    net.append(net[-1])
    calls = []
    net[-1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 16, 16)
    wanted = net(x)
    assert to_group_norm(net, decompose_layer_norm=True) == 3
    assert net[-1] is net[-2]
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.slow
def test_torch_export_with_free_sizes():
    net = model()
    plain = copy.deepcopy(net)
    to_group_norm(plain, decompose_layer_norm=True)
    n, h, w = (torch.export.Dim(name, min=2, max=512) for name in "nhw")
    shapes = ({0: n, 2: 2 * h, 3: 2 * w},)
    program = torch.export.export(plain, (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.rsqrt.default" in operators and "aten.group_norm.default" in operators
    for x in (torch.randn(3, 3, 24, 40), torch.randn(2, 3, 64, 12)):
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def onnx_file(net, x, path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        pytest.skip("the ONNX exporter of torch below 2.5 does not go with onnxscript of today")
    torch.onnx.export(net, (x,), path, dynamo=True, opset_version=21, verbose=False)
    return path


def groups_of_nodes(path):
    nodes = pytest.importorskip("onnx").load(path).graph.node
    norms = [node for node in nodes if node.op_type == "GroupNormalization"]
    return sorted(a.i for node in norms for a in node.attribute if a.name == "num_groups")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_node_of_one_group_is_exported(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    for decompose, groups in ((False, [1, 1, 8]), (True, [8])):
        net = model()
        to_group_norm(net, decompose_layer_norm=decompose)
        assert groups_of_nodes(onnx_file(net, x, tmp_path / "net.onnx")) == groups


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_large_maps_are_averaged_as_exactly_in_onnxruntime(tmp_path):
    """Summed one after the other, 5 million values are wrong by 1e-4."""
    onnxruntime = pytest.importorskip("onnxruntime")
    norm, x = nn.GroupNorm(1, 64), torch.randn(1, 64, 240, 320)
    wanted = norm(x)
    to_group_norm(norm, decompose_layer_norm=True)
    path = onnx_file(norm, x, tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.as_tensor(output), wanted, rtol=0, atol=1e-5)


def test_what_cannot_be_changed_leaves_all_as_it_was():
    net = model()
    net.append(nn.ModuleList([PracticalGroupNorm(16), PracticalGroupNorm(16, rule="measured")]))
    both = r"2 have none yet: '8.0' \(GN_PRACTICAL\), '8.1' \(GN_MEASURED\)"
    with pytest.raises(ValueError, match=both):
        to_group_norm(net)
    assert type(net[1]) is PracticalGroupNorm and isinstance(net[0], WSConv2d)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        to_group_norm("net")
    net = model()
    nn.utils.parametrizations.weight_norm(net[1])
    with pytest.raises(TypeError, match="'1', a Parametrized"):
        to_group_norm(net)
    assert type(net[4]) is PracticalGroupNorm and isinstance(net[0], WSConv2d)
