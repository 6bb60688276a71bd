"""Files of ResNets' weights, for tests."""

import pickle

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed")
from safetensors.torch import save_file

from gnpractical.tv import fasterrcnn_resnet_fpn

SMALL = {"num_classes": 3, "channels": 32, "box_convs": 1, "fc_channels": 32}


def randomized(model):
    torch.manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.1))
    return model


def write(path, weights):
    if path.suffix == ".safetensors":
        save_file({k: v.clone() for k, v in weights.items()}, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({k: v.numpy() for k, v in weights.items()}))
    else:
        torch.save(weights, path)
    return str(path)


def small(**kwargs):
    return fasterrcnn_resnet_fpn(depth=18, **SMALL, **kwargs)
