"""Gradients of each sample, which differentially private training clips: torch.func and Opacus."""

import pytest
import torch
from torch import nn

from gnpractical import convert, to_group_norm
from gnpractical.layers.weight_standardization import Standardized


class Net(nn.Module):
    """A residual net with a grouped convolution, in one, two or three dimensions."""

    def __init__(self, dim):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
        self.stem = nn.Sequential(conv(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())
        self.block = nn.Sequential(conv(8, 8, 3, padding=1, groups=2), norm(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        # Not the mean: it is the same for every sample behind a norm of one group.
        return self.head((x + self.block(x)).flatten(2).amax(2))


def net_and_inputs(dim, standardized, rule="cpg_4"):
    model, x = Net(dim), torch.randn(4, 3, *[7] * dim)
    convert(model, x, rule=rule, weight_standardization=standardized)
    assert sum(isinstance(m, Standardized) for m in model.modules()) == 2 * standardized
    return model.double().train(), x.double()


def one_at_a_time(model, x):
    """The gradients of each sample's loss, by parameter."""
    parameters = dict(model.named_parameters())
    losses = [model(sample[None]).square().sum() for sample in x]
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    stacked = dict(zip(parameters, map(torch.stack, zip(*gradients, strict=True)), strict=True))
    assert all(gradient.abs().max() > 1e-3 for gradient in stacked.values())
    return stacked


def assert_same(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("rule", ["practical", "cpg_4"])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_torch_func(dim, standardized, rule):
    model, x = net_and_inputs(dim, standardized, rule)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert_same(gradients, one_at_a_time(model, x))


def wrapped(model, mode):
    utils = pytest.importorskip("opacus.grad_sample.utils", reason="Opacus is not installed")
    return utils.wrap_model(model, mode, loss_reduction="sum")


# Opacus takes no gradients at the images, and PyTorch remarks on that.
without_image_gradients = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


# "hooks" has a rule for each of PyTorch's classes, which must not be used for standardized ones,
# and takes torch.func for others; "functorch" always does.
@without_image_gradients
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_opacus(dim, standardized, mode):
    model, x = net_and_inputs(dim, standardized)
    expected = one_at_a_time(model, x)
    wrapped(model, mode)(x).square().sum().backward()
    assert_same({name: p.grad_sample for name, p in model.named_parameters()}, expected)


@without_image_gradients
@pytest.mark.parametrize("standardized", [False, True])
def test_opacus_ghost_clipping(standardized):
    model, x = net_and_inputs(2, standardized)
    expected = {name: g.flatten(1).norm(dim=1) for name, g in one_at_a_time(model, x).items()}
    ghost = wrapped(model, "ghost")
    ghost.max_grad_norm = 1.0
    ghost(x).square().sum().backward()
    assert_same({name: p._norm_sample for name, p in model.named_parameters()}, expected)


def test_expanded_weights_take_plain_norms_only():
    model, x = net_and_inputs(2, standardized=False)
    expected = one_at_a_time(model, x)
    with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle"):
        wrapped(model, "ew")(x)
    to_group_norm(model)
    wrapped(model, "ew")(x).square().sum().backward()
    assert_same({name: p.grad_sample for name, p in model.named_parameters()}, expected)


@without_image_gradients
@pytest.mark.parametrize("standardized", [False, True])
def test_monai_unet_with_opacus(standardized):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    model = nets.UNet(3, 1, 2, channels=(8, 16), strides=(2,), num_res_units=1, norm="BATCH")
    x = torch.randn(2, 1, 8, 8, 8)
    convert(model, x, weight_standardization=standardized)
    model, x = model.double(), x.double()
    expected = one_at_a_time(model, x)
    wrapped(model, "hooks")(x).square().sum().backward()
    assert_same({name: p.grad_sample for name, p in model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore")  # that the noise is not cryptographically safe, for one
@pytest.mark.parametrize("standardized", [False, True])
def test_private_training(standardized):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed")
    refused = opacus.validators.ModuleValidator.validate(Net(2))
    assert len(refused) == 2 and all("BatchNorm" in str(error) for error in refused)
    model, x = net_and_inputs(2, standardized)
    opacus.validators.ModuleValidator.validate(model, strict=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.utils.data.TensorDataset(x, torch.tensor([0, 1, 2, 0]))
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,  # which may draw no sample at all, see docs/privacy.md
    )
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(images), labels).backward()
        optimizer.step()
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not any(after[name].equal(value) for name, value in before.items())


def test_averaging_the_parameters_averages_all_of_a_model():
    batch_norms, (model, _) = Net(2), net_and_inputs(2, standardized=True)
    assert batch_norms.state_dict().keys() > dict(batch_norms.named_parameters()).keys()
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
