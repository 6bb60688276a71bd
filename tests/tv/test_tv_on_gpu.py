"""Training on torchvision as it is on a GPU: precision, devices, loaders, processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

import torch
import torch.distributed as dist
from helpers.short_recipe import recipe
from torch import nn
from torch.utils.data import DataLoader

from gnpractical.runs.accumulation import Accumulated
from gnpractical.tv import training
from gnpractical.tv.datasets import collate
from gnpractical.tv.training import train

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def saved(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_mixed_precision(gpu, tiny_panoptic, dataset, tmp_path):
    train(tiny_panoptic().to(gpu), dataset, recipe(3, amp=True), str(tmp_path))
    assert all(v.isfinite().all() for v in saved(tmp_path)["model"].values())


def test_float16_with_scaled_losses_of_accumulated_batches(
    gpu, tiny_panoptic, dataset, tmp_path, monkeypatch
):
    def float16(device, mixed):
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=mixed)
        return torch.autocast(device.type, torch.float16, enabled=mixed), scaler

    monkeypatch.setattr(training, "precision", float16)
    model = tiny_panoptic().to(gpu)
    before = {k: v.clone() for k, v in model.named_parameters()}
    options = {"amp": True, "accumulate": 2, "clip_grad_norm": 10.0}
    train(model, dataset, recipe(2, **options), str(tmp_path))
    assert saved(tmp_path)["scaler"]["scale"] == 2.0**10  # no step was left out
    moved = [not torch.equal(before[k], v) for k, v in model.named_parameters() if v.dim() > 1]
    assert all(moved) and all(v.isfinite().all() for v in model.parameters())
    train(tiny_panoptic().to(gpu), dataset, recipe(3, **options), str(tmp_path), resume=True)
    assert saved(tmp_path)["iteration"] == 2


@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_run_goes_on_on_another_device(gpu, tiny_panoptic, dataset, tmp_path, first):
    places = (gpu, "cpu") if first == "gpu" else ("cpu", gpu)
    for iterations, place in zip((2, 4), places, strict=True):
        model = tiny_panoptic().to(place)
        train(model, dataset, recipe(iterations), str(tmp_path), resume=True)
    assert saved(tmp_path)["iteration"] == 3
    assert all(v.isfinite().all() for v in model.parameters())


def test_pinned_batches(gpu, tiny_panoptic, dataset):
    loader = DataLoader(dataset, 2, num_workers=1, collate_fn=collate, pin_memory=gpu == "cuda")
    images, targets = next(iter(loader))
    tensors = [*images, *(v for t in targets for v in t.values() if isinstance(v, torch.Tensor))]
    assert all(tensor.is_pinned() for tensor in tensors) or gpu == "cpu"
    losses = tiny_panoptic().to(gpu)(*training._to((images, targets), torch.device(gpu)))
    assert all(loss.isfinite() for loss in losses.values())


def test_the_same_losses_as_on_the_cpu(gpu, tiny_panoptic, dataset):
    found = {}
    for place in ("cpu", gpu):
        torch.manual_seed(0)
        model = tiny_panoptic().double()
        model.to(place)
        batch = [dataset[i] for i in range(2)]
        images, targets = training._to(collate(batch), torch.device(place))
        losses = model([image.double() for image in images], targets)
        found[place] = losses["loss_semantic"].item()  # others are of proposals drawn at random
    assert found[gpu] == pytest.approx(found["cpu"], rel=1e-6)


def test_gradients_by_nccl(gpu, tiny_panoptic, dataset):
    model = tiny_panoptic().to(gpu)
    batch = training._to(collate([dataset[i] for i in range(2)]), torch.device(gpu))
    gradients = []
    backend = "nccl" if gpu == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        ids = [0] if gpu == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        scaler = torch.amp.GradScaler(gpu, enabled=False)
        for each in (model, wrapped):
            model.zero_grad()
            losses = Accumulated(each, scaler)([batch, batch])
            sum(losses.values()).backward()
            gradients.append(model.semantic_branch.predictor.weight.grad.clone())
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_the_script_in_a_process_of_torchruns(gpu, datasets_dir, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--standalone", "tools/train_torchvision.py", "--quick", "--iterations", "2"]
    command += ["--min-size", "64", "--device", gpu, "--amp", "--output-dir", str(tmp_path)]
    env = os.environ | {"DETECTRON2_DATASETS": str(datasets_dir)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(tmp_path)["iteration"] == 1 and "panoptic_seg PQ" in done.stdout
