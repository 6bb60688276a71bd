"""What Detectron2's ``build_model`` does from now on.

It applies ``MODEL.GNP.WEIGHT_STANDARDIZATION``, and warns of ``NORM`` keys of which nothing comes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import meta_arch
from torch import Tensor, nn

from gnpractical.d2.norm import watch_norms
from gnpractical.d2.rebind import rebind
from gnpractical.layers.weight_standardization import (
    STANDARDIZED,
    WSConv2d,
    apply_weight_standardization,
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


def standardize_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Standardize the weights of the parts of ``model`` that ``cfg`` names.

    Raises:
        ValueError: A part does not exist or has no norms; the message names the key.
    """
    if cfg.MODEL.GNP.WEIGHT_STANDARDIZATION:
        try:
            apply_weight_standardization(model, cfg.MODEL.GNP.WEIGHT_STANDARDIZATION)
        except ValueError as e:
            raise ValueError(f"MODEL.GNP.WEIGHT_STANDARDIZATION: {e}") from None


def _extended(original: Callable) -> Callable:
    @functools.wraps(original)
    def build_model(cfg: CfgNode) -> nn.Module:
        watched_cfg, watched = watch_norms(cfg)
        model = original(watched_cfg)
        if unused := [f"{key} {name}" for key, name in watched.items() if not name.asked]:
            logger.warning(
                "No norm was built for %s: this part of the model does not ask Detectron2's "
                "get_norm for it, and may have no norms at all. Where it tests for 'GN', let it "
                "call get_norm.",
                ", ".join(unused),
            )
        if "GNP" in cfg.MODEL:
            standardize_weights(model, cfg)
        return model

    return build_model


build_model = _extended(meta_arch.build_model)
rebind(build_model.__wrapped__, build_model)  # type: ignore[attr-defined]
