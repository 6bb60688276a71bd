"""Steps of several batches are those of one large batch, alone and in two processes."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gnpractical.layers import PracticalGroupNorm
from gnpractical.runs.accumulation import Accumulated, Grouped

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two losses, means over the images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), PracticalGroupNorm(8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        )

    def forward(self, images):
        out = self.net(images)
        return {"loss_a": out[:, 0].square().mean(), "loss_b": (out[:, 1] - 1).abs().mean()}


def train(model, batches, autocast=False):
    """Return the losses of each step, and the final weights."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    history = []
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(batch)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history, torch.cat([p.detach().flatten() for p in model.parameters()])


def scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("autocast", [False, True])
def test_four_times_two_are_eight(autocast):
    whole, weights = train(Accumulated(Model(), scaler()), Grouped(IMAGES.split(8), 1), autocast)
    parts, same = train(Accumulated(Model(), scaler()), Grouped(IMAGES.split(2), 4), autocast)
    assert len(whole) == len(parts) == 4
    tolerance = {"rtol": 0.03, "atol": 3e-3} if autocast else {"rtol": 1e-5, "atol": 1e-7}
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    torch.testing.assert_close(weights, same, **tolerance)
    other = train(Accumulated(Model(), scaler()), Grouped(IMAGES.split(2), 1), autocast)[1]
    assert (other - weights).abs().max() > 0.01  # 16 steps of 2 are something else


def test_outside_training_it_is_the_model():
    model = Accumulated(Model(), scaler()).eval()
    assert model(IMAGES) == model.model(IMAGES)


def _in_two_processes(rank, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(Model())
    exchanges = []

    def exchange(_, bucket):
        exchanges.append(1)
        gradients = bucket.buffer() / 2
        dist.all_reduce(gradients)  # waits, so that no thread outlives the process group
        done = torch.futures.Future()
        done.set_result(gradients)
        return done

    model.register_comm_hook(None, exchange)
    mine = [part[rank : rank + 1] for part in IMAGES.split(2)]
    weights = train(Accumulated(model, scaler()), Grouped(mine, 4))[1]
    torch.save((weights, len(exchanges)), f"{path}{rank}")
    del model  # it holds the process group, whose threads must end before the interpreter
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_exchange_gradients_once_a_step(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, port, str(tmp_path / "rank")) for rank in range(2)]
    processes = [context.Process(target=_in_two_processes, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = train(Accumulated(Model(), scaler()), Grouped(IMAGES.split(8), 1))[1]
    for rank in range(2):
        weights, exchanges = torch.load(tmp_path / f"rank{rank}")
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
        assert exchanges == 4  # one bucket, four steps of four parts
