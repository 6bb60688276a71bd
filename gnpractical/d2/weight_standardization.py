"""Weight standardization of the parts of a Detectron2 model that a config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.layers import Conv2d
from torch import Tensor, nn

from gnpractical.layers.pairing import find_pairs
from gnpractical.layers.weight_standardization import (
    STANDARDIZED,
    WSConv2d,
    standardize_layer,
)

logger = logging.getLogger(__name__)


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


def apply_weight_standardization(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Standardize, in place, the convolutions under ``prefixes`` that are followed by a norm.

    Parameters, hooks and state_dict keys stay as they are: only the class changes. Convolutions
    of other classes (deformable ones) are left alone and logged.

    Args:
        model: any model of Detectron2's.
        prefixes: module paths, such as "backbone" or "roi_heads.box_head".

    Returns:
        Paths of the convolutions that are standardized.

    Raises:
        ValueError: a prefix under which there is nothing to standardize.
    """
    done, skipped = [], []
    pairs = [(p.layer_name, p.layer) for p in find_pairs(model) if p.layer_name is not None]
    for prefix in prefixes:
        found = [(n, m) for n, m in pairs if n == prefix or n.startswith(f"{prefix}.")]
        if not found:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"MODEL.GNP.WEIGHT_STANDARDIZATION: {prefix!r} has no weight layer followed by a "
                f"norm. Module paths start with one of: {known}."
            )
        for name, layer in found:
            if standardize_layer(layer):
                done.append(name)
            else:
                skipped.append(f"{name} ({type(layer).__name__})")
    logger.info("Weight standardization of %d convolutions under %s", len(done), list(prefixes))
    if skipped:
        logger.warning(
            "Not standardized, no plain convolutions: %d, first: %s", len(skipped), skipped[:3]
        )
    return done
