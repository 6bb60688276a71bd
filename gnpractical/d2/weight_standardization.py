"""Weight standardization of Detectron2's own convolution class."""

from __future__ import annotations

from detectron2.layers import Conv2d
from torch import Tensor

from gnpractical.layers.weight_standardization import STANDARDIZED, WSConv2d


class WSDetectronConv2d(WSConv2d, Conv2d):
    """Detectron2's ``Conv2d`` (with ``norm`` and ``activation``), weight standardized.

    Detectron2's forward convolves with ``self.weight`` itself, past ``WSConv2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


STANDARDIZED[Conv2d] = WSDetectronConv2d
