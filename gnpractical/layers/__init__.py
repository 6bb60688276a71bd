from gnpractical.layers.group_norm import PracticalGroupNorm, group_norm_from_name
from gnpractical.layers.pairing import find_pairs

__all__ = ["PracticalGroupNorm", "find_pairs", "group_norm_from_name"]
