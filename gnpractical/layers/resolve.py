"""Numbers of groups for norms whose layer the structure of the modules does not show."""

from __future__ import annotations

from typing import Any

from torch import nn

from gnpractical.layers.data_flow import FUNCTION
from gnpractical.layers.group_norm import MEASURED, PracticalGroupNorm
from gnpractical.layers.norm_calls import feeding_sources, trace_norms
from gnpractical.layers.pairing import check_model


def resolve_norms(model: nn.Module, example_inputs: Any) -> dict[str, int | None]:
    """Find by data flow the layers that feed unresolved norms, and give these their numbers.

    Norms in lists, as of Res2Net, are not registered beside their layers.

    Args:
        model: It runs once, in evaluation mode and without gradients.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        For the path of every norm that was unresolved its number of groups, None where that is yet
        to be calibrated.

    Raises:
        ValueError: The model cannot run on the inputs, or norms do not run or have no one layer.
            The message names all of them, and none is changed.
    """
    check_model(model)
    unresolved = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PracticalGroupNorm)
        and module.num_groups is None
        and not (module.rule == MEASURED and module.in_channels)
    }
    if not unresolved:
        return {}
    modules = dict(model.named_modules())
    feeding = feeding_sources(model, trace_norms(model, example_inputs))
    problems = [f"{n}: {feeding[m][1]}" for n, m in unresolved.items() if feeding[m][0] is None]
    if problems:
        raise ValueError(f"{len(problems)} norms have no one layer: {'; '.join(problems)}")
    for norm in unresolved.values():
        source, _ = feeding[norm]
        assert source is not None
        norm.resolve(source.in_channels)
        norm.fed_by = tuple(modules[name] for name in source.layers if name != FUNCTION)
    return {name: norm.num_groups for name, norm in unresolved.items()}
