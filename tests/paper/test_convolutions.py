import pytest
import torch
import torch.nn.functional as F

from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.paper.convolutions import Setting, simulate_convolutions


@pytest.mark.parametrize("setting", [Setting(32, 64), Setting(64, 32, stride=2, padding="zeros")])
def test_the_law_holds_and_the_papers_does_not(setting):
    for row in simulate_convolutions(setting, trials=12):
        error = 0.1 if row.channels_per_group == 1 else 0.05
        assert row.law == pytest.approx(row.measured, rel=error)
        assert row.standard_error < 0.05 * row.measured
        if row.channels_per_group < 8:
            assert row.paper > 1.4 * row.measured


def test_the_law_in_terms_of_the_layers_input():
    torch.manual_seed(0)
    x = torch.randn(64, 64, 12, 12) + 0.8 * torch.randn(64, 64, 1, 1)
    x = x.relu().requires_grad_()
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), torch.randn(32, 64, 3, 3), stride=2)
    with torch.no_grad():
        energy = x.square().mean().item()
        share = x.mean((2, 3)).square().mean().item() / energy
    for num_groups in (1, 8, 32):
        z = F.group_norm(y, num_groups)
        gradient = torch.randn_like(z)
        (at_input,) = torch.autograd.grad(z, x, gradient, retain_graph=True)
        law = gradient_variance_ratio(
            64, 32, num_groups, "exact", share, positions=36, gain_ratio=energy, stride=2
        )
        assert law == pytest.approx((at_input.var() / gradient.var()).item(), rel=0.12)


def test_one_trial_has_no_error():
    with pytest.raises(ValueError, match="trials must be at least 2, .* got 1"):
        simulate_convolutions(Setting(), trials=1)
