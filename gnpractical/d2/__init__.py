"""GN_PRACTICAL in Detectron2. Importing this package

* makes Detectron2's ``get_norm`` accept ``GN_PRACTICAL`` and the other names of
  ``layers.group_norm.norm_names``;
* makes its ``build_model`` apply ``MODEL.GNP.WEIGHT_STANDARDIZATION``, where the config has it;
* registers the backbones ``build_gnp_resnet_backbone`` and ``build_gnp_resnet_fpn_backbone``;
* registers the data sets ``gnp_shapes_train`` and ``gnp_shapes_val``.
"""

from gnpractical.d2 import backbone, datasets, norm, standardized_model  # noqa: F401 (see above)
from gnpractical.d2.config import add_gnp_config, load_config
from gnpractical.layers.weight_standardization import apply_weight_standardization

__all__ = ["add_gnp_config", "apply_weight_standardization", "load_config"]
