import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import measure_gradient_variance
from gnpractical.layers import PracticalGroupNorm
from gnpractical.measure.gradient_isometry import PooledVariance


class Residual(nn.Module):
    """Functional activations, an in-place residual addition, and a head run on two levels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, 8)
        self.head = nn.Sequential(nn.Conv2d(8, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(inplace=True))
        self.weights = torch.randn(2, 6, 8, 4)

    def forward(self, x):
        a = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(a))
        out += a
        out = F.relu_(out)
        two = self.head(out[..., ::2])
        return {"one": self.head(out).square().sum(), "two": (two * self.weights).sum()}


def naive_variances(model, x):
    """Input and output gradient of every block by a forward that keeps all tensors apart."""
    x = x.clone().requires_grad_()
    z1 = model.norm1(model.conv1(x))
    a = z1.relu()
    a_block = a.clone()  # what conv2 reads, without the shortcut
    z2 = model.norm2(model.conv2(a_block))
    out = (z2 + a).relu()
    in1, in2 = out.clone(), out[..., ::2].clone()
    out1, out2 = (F.relu(model.head[1](model.head[0](i))) for i in (in1, in2))
    tensors = [x, a, a_block, z2, in1, out1, in2, out2]
    g = torch.autograd.grad(out1.square().sum() + (out2 * model.weights).sum(), tensors)
    heads_in = torch.cat([g[4].flatten(), g[6].flatten()])
    heads_out = torch.cat([g[5].flatten(), g[7].flatten()])
    pairs = {"norm1": (g[0], g[1]), "norm2": (g[2], g[3]), "head.1": (heads_in, heads_out)}
    return {n: tuple(t.var(correction=0).item() for t in pair) for n, pair in pairs.items()}


def test_equals_a_naive_computation():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    rows = {row.name: row for row in measure_gradient_variance(model, [x])}
    for name, (input_variance, output_variance) in naive_variances(model, x).items():
        assert rows[name].input_variance == pytest.approx(input_variance, rel=1e-4)
        assert rows[name].output_variance == pytest.approx(output_variance, rel=1e-4)
        assert rows[name].ratio == pytest.approx(input_variance / output_variance, rel=1e-4)
    assert {name: row.activation for name, row in rows.items()} == {
        "norm1": "relu",
        "norm2": None,
        "head.1": "relu",
    }
    assert [rows["norm1"].in_channels, rows["norm1"].out_channels] == [3, 8]
    assert rows["head.1"].num_groups == 3 and rows["head.1"].layer == "head.0"


def test_several_batches_are_pooled():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    once = measure_gradient_variance(model, [x])
    twice = measure_gradient_variance(model, [x, x])
    for a, b in zip(once, twice, strict=True):
        assert a.input_variance == pytest.approx(b.input_variance, rel=1e-6)


def snapshot(model):
    return (
        {n: t.clone() for n, t in model.state_dict().items()},
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.random.get_rng_state(),
    )


def assert_same(before, after):
    for name, tensor in before[0].items():
        torch.testing.assert_close(tensor, after[0][name], rtol=0, atol=0)
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(fails):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU()).eval()
    model[1].train()

    def loss(model, batch):
        if fails and batch.sum() > 0:
            raise KeyError("in the middle")
        return model(batch).sum()

    batches = [-torch.rand(5, 4), torch.rand(5, 4)]
    before = snapshot(model)
    try:
        measure_gradient_variance(model, batches, loss)
    except KeyError:
        assert fails
    gc.collect()
    assert_same(before, snapshot(model))


def test_runs_in_training_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6)).eval()
    seen = []
    measure_gradient_variance(
        model, [torch.randn(2, 4)], lambda m, b: seen.append(m.training) or (m(b) ** 3).sum()
    )
    assert seen == [True]


def test_a_model_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x = Residual(), torch.randn(2, 3, 8, 8)
        parallel = nn.parallel.DistributedDataParallel(model)
        rows = measure_gradient_variance(parallel, [x])
        assert [r.ratio for r in rows] == [r.ratio for r in measure_gradient_variance(model, [x])]
        sum(parallel(x).values()).backward()  # the reducer still works
        assert model.conv1.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_blocks_that_cannot_be_measured_say_why():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.GroupNorm(3, 6)
    )
    model.add_module("unused", nn.Sequential(nn.Linear(6, 2), nn.GroupNorm(1, 2)))

    class FirstFive(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            # The sum of normalized values is constant: no gradient passes the last norm.
            return nn.Sequential(*list(model)[:5])(x).sum() * 0.0

    rows = measure_gradient_variance(FirstFive(), [torch.randn(3, 4)])
    assert [row.ratio for row in rows] == [None, None, None]
    assert "zero throughout" in rows[0].skipped_reason and rows[0].skipped_calls == 1
    assert "did not run" in rows[2].skipped_reason


def test_gradients_that_are_not_finite_are_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU())

    def loss(model, x):
        out = model(x)
        return (out * (torch.inf if x.sum() > 0 else 1)).clamp(max=1e3).pow(3).sum().nan_to_num()

    x = torch.rand(3, 4)
    good = measure_gradient_variance(model, [-x], loss)[0]
    both = measure_gradient_variance(model, [-x, x], loss)[0]
    assert both.skipped_calls == 1 and both.ratio == pytest.approx(good.ratio)


def test_vanishing_gradients_are_measured():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    rows = measure_gradient_variance(model, [x])
    tiny = measure_gradient_variance(model, [x], lambda m, b: sum(m(b).values()) * 1e-22)
    for row, small in zip(rows, tiny, strict=True):
        assert small.ratio == pytest.approx(row.ratio, rel=1e-3)


def test_plain_attributes_are_restored():
    class Average(nn.Sequential):
        average = 1.0

        def forward(self, x):
            self.average = 0.9 * self.average + 0.1 * x.mean().item()
            return super().forward(x)

    model = Average(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    model.average = 5.0
    measure_gradient_variance(model, [torch.randn(2, 3)], lambda m, b: m(b).pow(3).sum())
    assert model.average == 5.0


@pytest.mark.parametrize("batches, loss", [(torch.randn(2, 3), None), (3, None), ([1], "mse")])
def test_arguments_of_the_wrong_kind(batches, loss):
    with pytest.raises(TypeError, match="must be a"):
        measure_gradient_variance(Residual(), batches, loss)


@pytest.mark.parametrize(
    "model, batches, loss, message",
    [
        (nn.Linear(3, 3), [1], None, "has no unit block"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
            [torch.ones(2, 3)],
            lambda m, b: m(b).sum().detach(),
            "the loss has no gradient",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)), [], None, "no batches"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
            [torch.ones(2, 3)],
            None,
            r"must be a scalar tensor, got \(2, 4\): pass loss=",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
            [torch.ones(2, 3)],
            lambda m, b: m(b).sum() * torch.nan,
            "the loss is nan",
        ),
    ],
)
def test_bad_input(model, batches, loss, message):
    with pytest.raises(ValueError, match=message):
        measure_gradient_variance(model, batches, loss)


def test_the_exact_law_on_a_linear_layer():
    """1024 -> 512 with 16 channels a group: K is (512/1024) 14/13."""
    block = nn.Sequential(
        nn.Linear(1024, 512, bias=False), PracticalGroupNorm(512, rule=32), nn.ReLU()
    )
    nn.init.normal_(block[0].weight, std=0.05)
    weights = torch.randn(64, 512)
    x = nn.GroupNorm(64, 1024)(torch.randn(64, 1024)).relu().detach()
    (row,) = measure_gradient_variance(block, [x], lambda m, b: (m(b) * weights).sum())
    assert row.ratio == pytest.approx(14 / 26, rel=0.05)


def test_a_variance_is_never_negative():
    nearly = torch.full((777,), 0.275)
    nearly[0] = torch.nextafter(nearly[0], torch.tensor(9.0))
    variance = PooledVariance()
    variance.add(nearly)
    variance.add(torch.full((333,), 0.275))
    expected = torch.cat([nearly, torch.full((333,), 0.275)]).double().var(correction=0).item()
    assert 0 < variance.value() == pytest.approx(expected, rel=1e-6)
