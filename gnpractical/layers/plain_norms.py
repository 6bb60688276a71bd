"""A model for deployment: plain group norms, with those of one group written out if need be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnpractical.layers.group_norm import PracticalGroupNorm
from gnpractical.layers.pairing import check_model
from gnpractical.layers.weight_standardization import fold_weight_standardization


class OneGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` of one group over (N, C, *), by elementary operations.

    Exported as ``GroupNormalization`` of one group, TensorRT computes it as an instance norm
    (NVIDIA/TensorRT issue 4756).
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        centered = wide - _mean(wide)
        variance = _mean(centered * centered)
        output = centered * torch.rsqrt(variance + self.eps)
        if self.affine:
            shape = [1, -1, *[1] * (input.dim() - 2)]
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)


def _mean(values: Tensor) -> Tensor:
    """The mean of (N, C, *) over all but N, of the shape (N, 1, *1)."""
    # Channel by channel first. ONNX Runtime adds up one after the other in single precision: over a
    # whole map of 256x200x272 that is wrong by 6e-4 of the largest output, and so by 4e-7.
    if values.dim() > 2:
        values = values.mean(list(range(2, values.dim())), keepdim=True)
    return values.mean(1, keepdim=True)


def to_group_norm(model: nn.Module, *, decompose_layer_norm: bool = False) -> int:
    """Make every :class:`PracticalGroupNorm` of ``model`` an ``nn.GroupNorm``, in place.

    For other programs, which then need no class of this package. Weight standardization is folded
    into the weights; outputs and state_dict keys stay the same. The model is no longer to be
    trained if it had weight standardization.

    Args:
        decompose_layer_norm: Also make every ``nn.GroupNorm`` of one group, which is a layer norm,
            a :class:`OneGroupNorm`.

    Returns:
        How many norms it changed.

    Raises:
        ValueError: Norms have no number of groups yet; it names them. Nothing is changed.
        TypeError: A norm is of a class derived from these, such as one with parametrizations, or
            a convolution cannot be folded. No norm is changed.
    """
    check_model(model)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, PracticalGroupNorm)}
    unready = [f"{name!r} ({m.norm_name})" for name, m in norms.items() if m.num_groups is None]
    if unready:
        raise ValueError(
            f"to_group_norm needs norms with a number of groups; {len(unready)} have none yet: "
            f"{', '.join(unready)}. Run the model once, or see gnpractical.resolve_norms and "
            f"gnpractical.calibrate"
        )
    for name, norm in norms.items():
        if type(norm) is not PracticalGroupNorm:
            raise TypeError(
                f"to_group_norm takes norms of the class PracticalGroupNorm; got {name!r}, a "
                f"{type(norm).__name__}. Remove its parametrizations"
            )
    fold_weight_standardization(model)
    plain = vars(nn.GroupNorm(1, 1)).keys()
    for norm in norms.values():
        # Hooks, and norms that stand in several places, stay as they are.
        norm.__class__ = nn.GroupNorm  # type: ignore[assignment]
        for attribute in vars(norm).keys() - plain:
            delattr(norm, attribute)
    changed: set[nn.Module] = set(norms.values())
    for module in model.modules():
        if decompose_layer_norm and type(module) is nn.GroupNorm and module.num_groups == 1:
            module.__class__ = OneGroupNorm
            changed.add(module)
    return len(changed)
