import pytest
import torch
from torch import nn

from gnpractical.layers.weight_standardization import WSConv2d


class Reference:
    """Weight standardization written down plainly."""

    @staticmethod
    def weight(weight, eps=0.0):
        """The mean out, divided by the unbiased std plus eps."""
        centered = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        std = centered.flatten(1).std(dim=1).view(-1, 1, 1, 1) + eps
        return centered / std

    @classmethod
    def output(cls, conv, x):
        weight = cls.weight(conv.weight)
        return nn.functional.conv2d(x.to(conv.weight.dtype), weight, conv.bias)

    @staticmethod
    def loss(conv, x):
        return conv(x).square().sum()

    @classmethod
    def gradient(cls, conv, inputs):
        """Of the weight, of the losses of all inputs together."""
        weight = conv.weight.detach().clone().requires_grad_()
        outputs = [nn.functional.conv2d(x, cls.weight(weight), conv.bias) for x in inputs]
        sum(out.square().sum() for out in outputs).backward()
        return weight.grad


@pytest.fixture
def reference():
    return Reference


@pytest.fixture
def conv():
    """A convolution whose filters have deviations of about 1, beside which eps is nothing."""
    conv = WSConv2d(3, 4, 3).double()
    nn.init.normal_(conv.weight)
    return conv


@pytest.fixture
def inputs():
    return [torch.randn(1, 3, size, size).double() for size in (5, 7, 9)]
