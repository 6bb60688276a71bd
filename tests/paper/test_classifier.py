import pytest
import torch
from torch import nn

from gnpractical.layers import PracticalGroupNorm
from gnpractical.paper.classifier import error_rate, fit

RECIPE = {"epochs": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 6, generator=generator)
    return list(zip(inputs.split(16), (inputs[:, 0] > 0).long().split(16), strict=True))


class Interrupted(list):
    """Batches whose third epoch breaks off."""

    epochs = 0

    def __iter__(self):
        self.epochs += 1
        for i, batch in enumerate(super().__iter__()):
            if self.epochs == 3 and i == 2:
                raise KeyboardInterrupt
            yield batch


class Noisy(nn.Sequential):
    """Draws random numbers as it trains, as augmentation does."""

    def __init__(self):
        torch.manual_seed(0)
        norm = PracticalGroupNorm(8, rule="measured")
        super().__init__(nn.Linear(6, 8), norm, nn.Dropout(0.2), nn.Linear(8, 2))


def calibrated(num_groups=2):
    model = Noisy()
    model[1].set_num_groups(num_groups)
    return model


def test_fit_learns_and_follows_the_cosine(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    history = fit(calibrated(), batches(), batches(), 0, tmp_path / "c.pth", **RECIPE)
    assert history.test_error < 25  # half the labels are either
    assert history.train_losses[-1] < history.train_losses[0]
    assert len(rates) == 16 and rates[0] == 0.1 and rates[8] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.001


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = calibrated()
    expected = fit(whole, batches(), batches(), 3, tmp_path / "whole.pth", **RECIPE)
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(KeyboardInterrupt):
        fit(calibrated(), Interrupted(batches()), batches(), 3, path, **RECIPE)
    torch.rand(5)  # whatever else happened to the random state
    resumed = Noisy()  # whose measured count the checkpoint brings
    history = fit(resumed, Interrupted(batches()), batches(), 3, path, **RECIPE)  # two epochs
    assert history.train_losses == expected.train_losses
    assert history.test_errors == expected.test_errors
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed[1].num_groups == 2
    other = fit(calibrated(), batches(), batches(), 4, tmp_path / "other.pth", **RECIPE)
    assert other.train_losses != expected.train_losses


def test_a_bad_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="checkpoint.pth must be a checkpoint of this.*Remove it"):
        fit(calibrated(), batches(), batches(), 0, path, **RECIPE)


def test_error_rate_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])
    data = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    assert error_rate(nn.Identity(), data) == 50.0
