"""Per-layer GroupNorm group counts from the layer's own widths. Imports torch at most."""

from gnpractical.activation_gain import activation_gain
from gnpractical.gradient_law import gradient_variance_ratio
from gnpractical.layers import PracticalGroupNorm
from gnpractical.layers.convert import convert
from gnpractical.layers.match_norms import match_norms, norm_targets
from gnpractical.layers.plain_norms import to_group_norm
from gnpractical.layers.resolve import resolve_norms
from gnpractical.layers.weight_standardization import fold_weight_standardization
from gnpractical.measure.calibration import calibrate
from gnpractical.measure.features import feature_statistics
from gnpractical.measure.gradient_isometry import measure_gradient_variance
from gnpractical.measure.layer_report import format_report, group_report
from gnpractical.num_groups import ideal_num_groups, practical_num_groups

__version__ = "0.1.0"

__all__ = [
    "PracticalGroupNorm",
    "activation_gain",
    "calibrate",
    "convert",
    "feature_statistics",
    "fold_weight_standardization",
    "format_report",
    "gradient_variance_ratio",
    "group_report",
    "ideal_num_groups",
    "match_norms",
    "measure_gradient_variance",
    "norm_targets",
    "practical_num_groups",
    "resolve_norms",
    "to_group_norm",
]
