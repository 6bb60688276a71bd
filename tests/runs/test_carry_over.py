import multiprocessing

import torch
import torch.distributed as dist
from torch import nn

from gnpractical.runs.carry_over import OtherNorms, match_loaded

BATCH_NORM = {"num_groups": None, "norm": "BatchNorm2d", "weight_standardized": False}


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8)
    )


def test_a_channel_that_did_not_vary_is_not_blown_up():
    model = build()
    statistics = {"1": (torch.zeros(8), torch.tensor([0.0] + [1.0] * 7))}
    other = OtherNorms("bn.pth", {"1": BATCH_NORM}, statistics)
    match_loaded(model, other, [torch.randn(16, 3, 12, 12)])
    deviation = model[:2](torch.randn(16, 3, 12, 12)).std((0, 2, 3))
    assert deviation[0] < 0.01 and deviation[1:].min() > 0.9


def match_on_own_batches(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build()
    batches = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(rank))]
    match_loaded(model, OtherNorms("bn.pth", {"1": BATCH_NORM, "4": BATCH_NORM}), batches)
    torch.save([model.state_dict(), batches], f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_all_processes_take_the_first_ones_weights(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=match_on_own_batches, args=(r, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (first, batches), (second, _) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    alone = build()
    match_loaded(alone, OtherNorms("bn.pth", {"1": BATCH_NORM, "4": BATCH_NORM}), batches)
    torch.testing.assert_close(first, alone.state_dict())
    torch.testing.assert_close(first, second)
    assert not torch.equal(first["1.weight"], build()[1].weight)
