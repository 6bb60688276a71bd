import pytest
import torch
import torch.nn.functional as F

from gnpractical.paper.simulation import EQUATIONS, simulate


def plain_trials(in_channels, out_channels, num_groups, trials):
    """The paper's experiment as it stands: one sample, new weights, one backward pass a trial."""
    sums = torch.zeros(len(EQUATIONS), dtype=torch.float64)
    for _ in range(trials):
        x0 = torch.randn(1, in_channels)
        x = F.relu(F.group_norm(x0 @ torch.randn(in_channels, in_channels), num_groups))
        x.requires_grad_()
        y = x @ torch.randn(in_channels, out_channels)
        z = F.group_norm(y, num_groups)
        out = F.relu(z)
        g = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, y, z, out])
        dx, dy, dz, dout = (t.var(correction=0).item() for t in g)
        sums += torch.tensor(
            [
                dx / dy,
                x.square().sum().item() * dy / dz,
                y.var(correction=0).item() * dy / dz,
                dz / dout,
                dx / dout,
            ]
        )
    return dict(zip(EQUATIONS, (sums / trials).tolist(), strict=True))


def test_agrees_with_the_plain_experiment():
    plain = plain_trials(96, 64, 4, trials=1500)
    for row in simulate(96, 64, 4, trials=5000):
        assert row.measured == pytest.approx(plain[row.equation], rel=0.03), row


def test_the_exact_law_holds_where_the_papers_does_not():
    rows = {row.equation: row for row in simulate(128, 64, 8, trials=20_000)}
    b = rows["B"]
    assert b.channels_per_group == 8 and b.paper == 1.5 and b.exact == pytest.approx(1.2)
    assert b.measured == pytest.approx(b.exact, rel=0.02)
    assert rows["B_layer"].exact == pytest.approx(1.2 * 61 / 64)
    assert rows["B_layer"].measured == pytest.approx(rows["B_layer"].exact, rel=0.02)
    assert rows["A"].measured == pytest.approx(64, rel=0.02)
    assert rows["C"].measured == pytest.approx(0.5, rel=0.02)
    assert rows["D"].measured == pytest.approx(0.6, rel=0.04)
    assert 0 < b.standard_error < 0.02


def test_seeded():
    assert simulate(32, 16, 2, 500, seed=3) == simulate(32, 16, 2, 500, seed=3)
    assert simulate(32, 16, 2, 500, seed=3) != simulate(32, 16, 2, 500, seed=4)


@pytest.mark.parametrize(
    "args, message",
    [
        ((32, 16, 3), "3 groups do not divide 16"),
        ((33, 16, 2), "2 groups do not divide 33"),
        ((32, 16, 16), "one channel"),
        ((32, 16, 2, 0), "trials must be at least 1"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        simulate(*args)
