import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gnpractical.layers import PracticalGroupNorm, group_norm_from_name


def reference(norm):
    stock = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
    stock.load_state_dict(norm.state_dict())
    return stock


@pytest.mark.parametrize("in_channels, channels, groups", [(256, 128, 32), (16, 16, 1), (64, 8, 8)])
@pytest.mark.parametrize("size", [(3, 5), (), (2, 3, 4)])
def test_equals_stock_group_norm_of_that_count(in_channels, channels, groups, size):
    norm = PracticalGroupNorm(channels, in_channels)
    assert norm.num_groups == groups
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if groups == channels and not size:
        size = (2,)
    x = torch.randn(4, channels, *size, requires_grad=True)
    out, expected = norm(x), reference(norm)(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, [x, norm.weight], grad),
        torch.autograd.grad((stock := reference(norm))(x), [x, stock.weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_state_dict_keys_are_those_of_group_norm():
    norm = PracticalGroupNorm(128, 256)
    assert list(norm.state_dict()) == list(nn.GroupNorm(32, 128).state_dict())
    norm.load_state_dict(nn.GroupNorm(32, 128).state_dict())


def test_survives_deepcopy_pickle_and_torch_save():
    norm = PracticalGroupNorm(12, 32, rule="closest")
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    copies = [
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        torch.load(file, weights_only=False),
    ]
    x = torch.randn(2, 12, 3, 3)
    for other in copies:
        assert (other.in_channels, other.num_groups, other.rule) == (32, 6, "closest")
        torch.testing.assert_close(other(x), norm(x), rtol=0, atol=0)


def test_a_copy_of_a_norm_alone_leaves_out_the_layers_that_feed_it():
    norm = PracticalGroupNorm(4, 8)
    # Registered after the norm, so that the copy meets it through the norm first.
    model = nn.ModuleDict({"norm": norm, "layer": nn.Linear(8, 4)})
    norm.fed_by = (model["layer"],)
    assert copy.deepcopy(norm).fed_by is None
    copied = copy.deepcopy(model)
    assert type(copied["norm"]) is PracticalGroupNorm and copied["norm"] is not norm
    assert copied["norm"].fed_by == (copied["layer"],) and norm.fed_by == (model["layer"],)


def test_unresolved_survives_deepcopy_and_pickle():
    for other in [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))]:
        norm = other(PracticalGroupNorm(128))
        assert norm.num_groups is None
        assert nn.Sequential(nn.Conv2d(256, 128, 1), norm)[1].num_groups == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), PracticalGroupNorm(16))
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
        assert model[0](x).dtype == dtype
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)


def test_torch_compile_without_graph_break():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), PracticalGroupNorm(16), nn.ReLU())
    x = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_errors_and_warnings_under_torch_compile():
    net = torch.compile(Net(), backend="eager")
    with pytest.raises(ValueError, match="8 groups on an input of shape"):
        net(torch.randn(2, 64, 1, 1))
    with pytest.warns(UserWarning, match="8 groups on an input of shape"):
        torch.compile(Net().eval(), backend="eager")(torch.randn(2, 64, 1, 1))
    unresolved = torch.compile(PracticalGroupNorm(4), backend="eager")
    with pytest.raises(RuntimeError, match=r"PracticalGroupNorm\(None, 4.*no weight layer"):
        unresolved(torch.randn(2, 4, 3, 3))


def test_torch_jit_script_and_export():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), PracticalGroupNorm(16)).eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_empty_batch_has_an_empty_result_and_zero_gradients():
    for channels in (64, 16):  # G = C and G = 1
        model = nn.Sequential(nn.Conv2d(320, channels, 1), PracticalGroupNorm(channels))
        out = model(torch.randn(0, 320, 1, 1))
        assert out.shape == (0, channels, 1, 1)
        out.sum().backward()
        assert model[1].weight.grad.abs().sum() == 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(64, 8, 1), PracticalGroupNorm(8))

    def forward(self, x):
        return self.stem(x)


@pytest.mark.parametrize("batch", [1, 4])
def test_single_value_groups_raise_in_training(batch):
    net = Net()
    assert net.stem[1].num_groups == 8
    with pytest.raises(
        ValueError, match=r"\(8, 8, in_channels=64.*: 8 groups on an input .* one value"
    ):
        net(torch.randn(batch, 64, 1, 1))


@pytest.mark.parametrize("batch", [1, 4])
def test_single_value_groups_warn_once_in_eval(batch):
    net = Net().eval()
    with pytest.warns(UserWarning, match=r"PracticalGroupNorm\(8, 8, in_channels=64.*: 8 groups"):
        out = net(torch.randn(batch, 64, 1, 1))
    assert out.abs().max() < 1e-4
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(batch, 64, 1, 1))


def test_one_value_per_channel_is_fine_with_fewer_groups():
    norm = PracticalGroupNorm(8, 8)
    assert norm.num_groups == 1
    norm(torch.randn(2, 8, 1, 1))


def test_unresolved_raises_at_first_use():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"norm": PracticalGroupNorm(40)})

        def forward(self, x):
            return self.inner["norm"](x)

    model = nn.Sequential(Odd())
    with pytest.raises(RuntimeError, match=r"\(None, 40, .*no weight layer.*resolve"):
        model(torch.randn(1, 40, 2, 2))


def test_resolve_by_hand():
    norm = PracticalGroupNorm(128)
    norm.resolve(256)
    assert (norm.in_channels, norm.num_groups) == (256, 32)


def test_fixed_count_needs_no_weight_layer():
    norm = PracticalGroupNorm(12, rule=4)
    x = torch.randn(2, 12, 3, 3)
    torch.testing.assert_close(norm(x), nn.GroupNorm(4, 12)(x), rtol=0, atol=0)


def test_fixed_count_that_does_not_divide():
    with pytest.raises(ValueError, match="48 groups do not divide 256 channels.*divisors of 256"):
        PracticalGroupNorm(256, 64, rule=48)
    with pytest.raises(ValueError, match=r"GN_48 at the norm of Conv2d\(64, 256\) in Sequential"):
        nn.Sequential(nn.Conv2d(64, 256, 1), PracticalGroupNorm(256, rule=48))


@pytest.mark.parametrize("bad", [0, -1])
def test_bad_widths(bad):
    with pytest.raises(ValueError, match="num_channels"):
        PracticalGroupNorm(bad)
    with pytest.raises(ValueError, match="in_channels"):
        PracticalGroupNorm(64, bad)


def test_bad_rule():
    with pytest.raises(ValueError, match="rule must be one of"):
        PracticalGroupNorm(64, 64, rule="exactly")
    with pytest.raises(TypeError, match="rule must be an integer"):
        PracticalGroupNorm(64, 64, rule=2.0)


def test_names():
    assert group_norm_from_name("GN_PRACTICAL", 8).rule == "practical"
    assert group_norm_from_name("GN_CLOSEST", 8).rule == "closest"
    assert group_norm_from_name("GN_16", 32).rule == 16
    assert group_norm_from_name("GN_UPTO_32", 48).rule == "upto_32"
    for other in ["GN", "BN", "GN_0", "GN_-1", "GN_x", "gn_practical", "GN_upto_32", "GN_CPG_0"]:
        assert group_norm_from_name(other, 8) is None
    for name in ["GN_PRACTICAL", "GN_CLOSEST", "GN_16", "GN_UPTO_32", "GN_CPG_16"]:
        assert group_norm_from_name(name, 32).norm_name == name


def test_measured_waits_for_its_count():
    conv = nn.Sequential(nn.Conv2d(8, 12, 1), group_norm_from_name("GN_MEASURED", 12))
    norm = conv[1]
    assert norm.norm_name == "GN_MEASURED" and norm.in_channels == 8 and norm.num_groups is None
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=r"\(None, 12, in_channels=8.*not been measured"):
            conv.train(mode)(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="5 groups do not divide 12"):
        norm.set_num_groups(5)
    norm.set_num_groups(4)
    x = torch.randn(2, 12, 3, 3)
    torch.testing.assert_close(norm(x), nn.GroupNorm(4, 12)(x))
    copied = pickle.loads(pickle.dumps(norm))
    assert copied.num_groups == 4 and copied.rule == "measured"


def test_rules_of_the_width_alone_need_no_layer():
    norm = group_norm_from_name("GN_UPTO_32", 48)
    assert norm.num_groups is None
    assert nn.Sequential(nn.ReLU(), norm)[1].num_groups == 24
    norm = PracticalGroupNorm(48, rule="cpg_16")
    norm(torch.randn(2, 48, 3, 3))
    assert norm.num_groups == 3
    assert (
        nn.Sequential(nn.Conv2d(8, 48, 1), PracticalGroupNorm(48, rule="cpg_4"))[1].in_channels == 8
    )
