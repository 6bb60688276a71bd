"""What has to hold of any converted model: its norms, their widths and gradients."""

import torch
from torch import nn

from gnpractical import PracticalGroupNorm, convert
from gnpractical.layers.data_flow import FUNCTION
from gnpractical.layers.pairing import layer_widths, norm_width


def converted(model, example_inputs, **kwargs):
    """The norms that were converted; none is left but for a reason, their widths the layers'."""
    before = [name for name, module in model.named_modules() if norm_width(module) is not None]
    conversion = convert(model, example_inputs, on_unpaired="keep", **kwargs)
    assert [norm.name for norm in conversion.norms] == before
    norms = [norm for norm in conversion.norms if not norm.skipped_reason]
    for norm in norms:
        module = model.get_submodule(norm.name)
        module = module[0] if isinstance(module, nn.Sequential) else module  # [1:] was in the norm
        assert type(module) is PracticalGroupNorm and norm.num_channels % norm.num_groups == 0
        known = [name for name in norm.layers if name != FUNCTION]
        widths = [layer_widths(model.get_submodule(name)) for name in known]
        if FUNCTION not in norm.layers:
            assert norm.in_channels == sum(width[0] for width in widths), norm.name
            assert norm.num_channels == sum(width[1] for width in widths), norm.name
    return norms, [norm for norm in conversion.norms if norm.skipped_reason]


def backward(model, output):
    outputs = output.values() if isinstance(output, dict) else output
    outputs = [output] if isinstance(output, torch.Tensor) else outputs
    sum(out.square().sum() for out in outputs).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    return {name for name, gradient in gradients.items() if gradient is not None}


def assert_all_reached(norms, reached):
    for norm in norms:
        weights = {f"{norm.name}.weight", f"{norm.name}.norm.weight"}
        assert weights & reached, f"no gradient reaches {norm.name}"
