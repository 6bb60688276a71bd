"""GN_PRACTICAL in Detectron2. Importing this package

* makes Detectron2's ``get_norm`` accept ``GN_PRACTICAL``, ``GN_CLOSEST`` and ``GN_<k>``;
* makes its ``build_model`` apply ``MODEL.GNP.WEIGHT_STANDARDIZATION``, where the config has it;
* registers the backbones ``build_gnp_resnet_backbone`` and ``build_gnp_resnet_fpn_backbone``;
* registers the data sets ``gnp_shapes_train`` and ``gnp_shapes_val``.
"""

from detectron2.modeling import meta_arch

from gnpractical.d2 import backbone, datasets, weight_standardization  # noqa: F401 (they register)
from gnpractical.d2.config import add_gnp_config, load_config
from gnpractical.d2.norm import extend
from gnpractical.layers.weight_standardization import apply_weight_standardization

__all__ = ["add_gnp_config", "apply_weight_standardization", "load_config"]


def _build_model(cfg):
    from gnpractical.d2 import build_standardized_model

    return build_standardized_model(cfg)


def build_standardized_model(cfg):
    """What ``build_model(cfg)`` returns once this package is imported."""
    model = _detectron2_build_model(cfg)
    if "GNP" in cfg.MODEL and cfg.MODEL.GNP.WEIGHT_STANDARDIZATION:
        try:
            apply_weight_standardization(model, cfg.MODEL.GNP.WEIGHT_STANDARDIZATION)
        except ValueError as e:
            raise ValueError(f"MODEL.GNP.WEIGHT_STANDARDIZATION: {e}") from None
    return model


_detectron2_build_model = extend(meta_arch.build_model, _build_model)
