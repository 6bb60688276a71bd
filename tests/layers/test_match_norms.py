import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnpractical import PracticalGroupNorm, convert, match_norms, norm_targets


def net(width=16, depth=10):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def images(count):
    """Stripes of four directions, in noise and random light."""
    labels = torch.arange(count) % 4
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    waves = torch.stack([x, y, x + y, x - y])[labels]
    light = 1 + torch.rand(count, 3, 1, 1)
    return light * torch.sin(1.5 * waves)[:, None] + 1.1 * torch.randn(count, 3, 12, 12), labels


def accuracy(model, data):
    with torch.no_grad():
        return (model.eval()(data[0]).argmax(1) == data[1]).float().mean().item()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(100):
        x, labels = images(64)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
    return model.eval()


def norms_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}


def outputs_of(model, x):
    """The mean and deviation of every channel behind each GroupNorm."""
    found, handles = {}, []
    for name, norm in norms_of(model).items():

        def note(module, args, output, name=name):
            found[name] = output.mean((0, 2, 3)), output.std((0, 2, 3), correction=0)

        handles.append(norm.register_forward_hook(note))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("rule", ["practical", 1, 8])
def test_outputs_have_the_mean_and_deviation_that_weight_and_bias_say(rule):
    model = convert(net(), rule=rule).model.eval()
    for norm in norms_of(model).values():
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
    wanted = {n: (m.bias.clone(), m.weight.abs().clone()) for n, m in norms_of(model).items()}
    x, _ = images(64)
    rows = match_norms(model, [x])
    assert [row.skipped_reason for row in rows] == [""] * 11
    for name, (mean, deviation) in outputs_of(model, x).items():
        torch.testing.assert_close(mean, wanted[name][0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(deviation, wanted[name][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["practical", 4])
def test_a_trained_batch_norm_net_keeps_what_it_knows(trained, rule):
    test = images(400)
    before = accuracy(trained, test)
    kept = convert(trained, rule=rule, inplace=False).model
    matched = copy.deepcopy(kept)
    match_norms(matched, [images(16)[0]])
    assert before > 0.95 and accuracy(kept, test) < 0.8
    assert accuracy(matched, test) > max(before - 0.3, accuracy(kept, test) + 0.1)


def test_several_batches_are_averaged_and_order_does_not_matter_much(trained):
    model = convert(trained, inplace=False).model
    x, _ = images(256)
    one, four = copy.deepcopy(model), copy.deepcopy(model)
    match_norms(one, [x])
    match_norms(four, iter(x.split(64)))
    for name, norm in norms_of(one).items():
        other = norms_of(four)[name]
        torch.testing.assert_close(norm.weight, other.weight, rtol=0.15, atol=0.02)
        torch.testing.assert_close(norm.bias, other.bias, rtol=0.15, atol=0.1)


def test_rows_say_what_changed_and_why_not():
    model = nn.ModuleDict(
        {
            "used": nn.Sequential(nn.Conv2d(3, 8, 1), PracticalGroupNorm(8)),
            "plain": nn.GroupNorm(2, 8, affine=False),
            "weighted": nn.GroupNorm(2, 8, bias=False),
            "idle": nn.GroupNorm(2, 8),
            "dead": nn.GroupNorm(8, 8),
        }
    )
    with torch.no_grad():
        model["used"][1].weight.fill_(2)

    def run(model, batch):
        x = model["weighted"](model["plain"](model["used"](batch)))
        return model["dead"](torch.zeros_like(x))

    rows = {row.name: row for row in match_norms(model, [images(8)[0]], run)}
    assert rows["used.1"].skipped_reason == "" and rows["used.1"].num_channels == 8
    weight, bias = model["used"][1].weight.detach(), model["used"][1].bias.detach()
    factor = (weight.abs() / 2).log().mean().exp().item()
    assert rows["used.1"].weight_factor == pytest.approx(factor, rel=1e-4)
    assert rows["used.1"].bias_shift == pytest.approx(bias.square().mean().sqrt().item(), rel=1e-4)
    assert "no weight and bias" in rows["plain"].skipped_reason
    assert "no weight and bias" in rows["weighted"].skipped_reason
    assert "did not run" in rows["idle"].skipped_reason
    assert "constant" in rows["dead"].skipped_reason
    assert model["dead"].weight.eq(1).all() and model["dead"].bias.eq(0).all()


def test_a_shared_norm_is_matched_over_all_its_calls():
    norm = nn.GroupNorm(1, 8)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 8, 1), norm)
    (row,) = match_norms(model, [torch.randn(16, 8, 6, 6)] * 3)
    assert row.skipped_reason == "" and torch.isfinite(norm.weight).all()


def test_norms_that_do_not_train_are_matched_too(trained):
    model = convert(trained, inplace=False).model.requires_grad_(False)
    match_norms(model, [images(16)[0]])
    assert accuracy(model, images(200)) > 0.65
    assert not any(p.requires_grad for p in model.parameters())


def test_targets_from_an_original_whose_parameters_do_not_say_it(trained):
    folded = copy.deepcopy(trained)
    for norm in [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]:
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias.detach() - norm.running_mean * scale
        with torch.no_grad():
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    batches = [images(64)[0]]
    assert accuracy(folded, images(200)) > 0.95
    targets = norm_targets(folded, batches)
    assert len(targets) == 11
    model = convert(folded, inplace=False).model
    match_norms(model, batches, targets=targets)
    assert accuracy(model, images(400)) > 0.65


def test_modes_buffers_and_random_state_are_as_before(trained):
    model = convert(copy.deepcopy(trained), include=["1", "4"]).model.train()
    model[9].eval()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x = images(16)[0]
    state = torch.get_rng_state()
    match_norms(model, [x], run=lambda m, batch: m(batch + torch.rand(())))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model[9].training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert not any(m._forward_hooks for m in model.modules())


class Broken(Exception):
    pass


def test_after_an_error_the_model_is_as_it_was(trained):
    model = convert(trained, inplace=False).model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def batches():
        yield images(8)[0]
        raise Broken

    with pytest.raises(Broken):
        match_norms(model, batches())
    with pytest.raises(RuntimeError):
        match_norms(model, [images(8)[0], torch.randn(2, 5, 12, 12)])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


def test_bad_input(trained):
    model = convert(trained, inplace=False).model
    with pytest.raises(ValueError, match="Linear has no GroupNorm to match"):
        match_norms(nn.Linear(2, 2), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match="There are no batches"):
        match_norms(model, [])
    with pytest.raises(TypeError, match="batches must be a list of batches, got Tensor"):
        match_norms(model, images(8)[0])
    with pytest.raises(RuntimeError, match="its number of groups has not been measured"):
        match_norms(convert(trained, rule="measured", inplace=False).model, [images(8)[0]])
    wrong = {"1": (torch.zeros(3), torch.ones(3))}
    with pytest.raises(ValueError, match="1: targets must have its 16 channels"):
        match_norms(model, [images(8)[0]], targets=wrong)
    for wrong in ({"1": (torch.zeros(16), None)}, {"1": torch.zeros(16)}, [1]):
        with pytest.raises(TypeError, match="targets"):
            match_norms(model, [images(8)[0]], targets=wrong)
    nan = torch.full((16,), float("nan"))
    with pytest.raises(ValueError, match="1: its targets, or its weight and bias, are not finite"):
        match_norms(model, [images(8)[0]], targets={"1": (nan, torch.ones(16))})
    with pytest.raises(ValueError, match="targets must name norms of the model.* first 'bn1'"):
        match_norms(model, [images(8)[0]], targets={"bn1": (torch.zeros(16), torch.ones(16))})
    with pytest.raises(ValueError, match="only must name norms of the model.* first 'nope'"):
        match_norms(model, [images(8)[0]], only=["1", "nope"])
    with pytest.raises(TypeError, match="only must be a list of paths"):
        match_norms(model, [images(8)[0]], only="1")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="1: what it gets from these batches is not finite"):
        match_norms(model, [images(8)[0], images(8)[0] * float("nan")])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="Linear has no norm to measure"):
        norm_targets(nn.Linear(2, 2), [torch.randn(2, 2)])


class Activated(nn.GroupNorm):
    def forward(self, x):
        return torch.relu(super().forward(x))


def test_norms_that_do_more_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Activated(2, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
    )
    x = torch.randn(2, 3, 6, 6)
    before = model[1].weight.detach().clone()
    rows = match_norms(model, [x])
    assert "Activated, may do more than normalize: convert it first" in rows[0].skipped_reason
    assert torch.equal(model[1].weight, before) and not rows[1].skipped_reason


def test_only_the_norms_that_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
    )
    before = model[1].weight.detach().clone()
    (row,) = match_norms(model, [torch.randn(2, 3, 6, 6)], only=["3"])
    assert row.name == "3" and torch.equal(model[1].weight, before)
    assert not torch.equal(model[3].weight, torch.ones(8))
