"""GroupNorm whose number of groups follows from the widths of the layer that feeds it."""

from __future__ import annotations

import copy
import difflib
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gnpractical.num_groups import (
    RULES,
    check_num_groups,
    check_width,
    num_groups_of_width,
    practical_num_groups,
)

# Not in RULES: no function of the widths; ``measure.calibration`` chooses on a model and data.
MEASURED = "measured"
_RULES = (*RULES, MEASURED)
# Fewer values to a group are avoided where the data are seen: with 1 the output is zero, with 2 the
# gradient, with 3 the gradient's expected variance is infinite.
MIN_VALUES = 4
_RULE_NAMES = [f"GN_{rule.upper()}" for rule in _RULES]


def _outside_graphs(method: Callable[..., None]) -> Callable[..., None]:
    """``torch.compiler.disable``, applied at the call: it imports the compiler, a second's work."""

    @functools.wraps(method)
    def call(*args: Any) -> None:
        torch.compiler.disable(method)(*args)

    return call


class PracticalGroupNorm(nn.GroupNorm):
    """GroupNorm over (N, C, *) with the number of groups that ``rule`` gives its layer.

    Created without ``in_channels`` it is *unresolved* (``num_groups`` is None) until it is
    registered in a module beside the weight layer that feeds it (see ``pairing``), or until
    :meth:`resolve` is called. With the rule ``"measured"`` it stays so until ``calibrate`` or a
    checkpoint's record has set its count. Parameters, state_dict keys and results are those of
    ``nn.GroupNorm`` with the same number of groups.

    Attributes:
        in_channels (int | None): input width of the weight layer that feeds this norm.
        needs_in_channels (bool): whether the rule asks for it.
        num_channels (int): C.
        num_groups (int | None): G, a divisor of C.
        fed_by (tuple[nn.Module, ...] | None): the layers whose outputs reach this norm, where
            ``convert`` has followed the data; None where the structure says it (see ``pairing``).
        rule (str | int): a rule of ``num_groups.practical_num_groups``, ``"measured"``,
            ``"upto_<k>"`` or ``"cpg_<n>"`` (see ``num_groups.num_groups_of_width``), or a fixed G.
    """

    num_groups: int  # None while unresolved; nn.GroupNorm declares int

    def __init__(
        self,
        num_channels: int,
        in_channels: int | None = None,
        rule: str | int = "practical",
        *,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_width("num_channels", num_channels)
        if isinstance(rule, str):
            if rule not in _RULES and num_groups_of_width(rule, 1) is None:
                raise ValueError(
                    f"rule must be one of {_RULES}, 'upto_<k>', 'cpg_<n>' or a number of groups; "
                    f"got {rule!r}"
                )
        else:
            check_width("rule", rule)
        if not (isinstance(eps, int | float) and 0 < eps < float("inf")):
            raise ValueError(f"eps must be a positive finite number, got {eps!r}")
        super().__init__(1, num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
        self.rule = rule
        self.needs_in_channels = rule in _RULES
        self.in_channels: int | None = None
        self.fed_by: tuple[nn.Module, ...] | None = None
        self.num_groups = None  # type: ignore[assignment]
        self._warned = False
        if in_channels is not None:
            self.resolve(in_channels)

    @property
    def norm_name(self) -> str:
        """The config string that selects this norm's rule, such as ``GN_PRACTICAL``."""
        return f"GN_{self.rule.upper()}" if isinstance(self.rule, str) else f"GN_{self.rule}"

    def resolve(self, in_channels: int | None, layer: str = "") -> None:
        """Fix the number of groups (with the rule ``"measured"``, the input width alone).

        Args:
            in_channels: input width of the weight layer that feeds this norm; None is enough
                for a fixed number of groups.
            layer: how to call that layer in an error message.

        Raises:
            ValueError: a fixed number of groups does not divide ``num_channels``.
        """
        if in_channels is not None:
            check_width("in_channels", in_channels)
        if self.rule == MEASURED:
            self.in_channels = in_channels
            return
        if isinstance(self.rule, str):
            num_groups = num_groups_of_width(self.rule, self.num_channels)
            if num_groups is None:
                assert in_channels is not None
                num_groups = practical_num_groups(in_channels, self.num_channels, self.rule)
        else:
            num_groups = self.rule
            try:
                check_num_groups(num_groups, self.num_channels)
            except ValueError as e:
                raise ValueError(f"{self.norm_name}{layer and f' at {layer}'}: {e}") from None
        self.in_channels = in_channels
        self.num_groups = num_groups

    def set_num_groups(self, num_groups: int) -> None:
        """Set the count that was measured for this norm, whose rule is ``"measured"``.

        Raises:
            TypeError, ValueError: another rule, or not a divisor of ``num_channels``.
        """
        if self.rule != MEASURED:
            raise ValueError(f"the number of groups of a norm with the rule {self.rule!r} is fixed")
        check_num_groups(num_groups, self.num_channels)
        self.num_groups = num_groups

    def __deepcopy__(self, memo: dict[int, Any]) -> PracticalGroupNorm:
        """A copy; of the norm alone, and not of a model with it, one that forgets ``fed_by``.

        Opacus copies every norm, and would copy its layers too and, by their hooks, the model.
        """
        state = vars(self) if memo else vars(self) | {"fed_by": None}
        replica = memo[id(self)] = self.__new__(type(self))
        vars(replica).update(copy.deepcopy(state, memo))
        return replica

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not isinstance(input, torch.fx.Proxy):  # whose sizes are not known
                self._check(input)
        # Not F.group_norm, which refuses groups of a single value for a batch of one only.
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def _check(self, input: Tensor) -> None:
        if self.num_groups is None:
            self._resolve_or_raise()
        values = input.shape[1] // self.num_groups
        for size in input.shape[2:]:
            values = values * size
        if values == 1 and input.shape[0] > 0:
            self._single_value(input)

    @_outside_graphs
    def _resolve_or_raise(self) -> None:
        if not self.needs_in_channels:
            return self.resolve(None)
        if self.rule == MEASURED:
            raise RuntimeError(
                f"{self}: its number of groups has not been measured. Before the first step call "
                f"gnpractical.calibrate(model, batches), or load a calibrated model's checkpoint "
                f"with a checkpointer of this package, which brings the counts."
            )
        raise RuntimeError(
            f"{self}: no weight layer was found that feeds this norm, so its number of groups is "
            f"unknown (gnpractical.group_report(model) shows its path). Call "
            f"gnpractical.resolve_norms(model, example_inputs), or register it right after its "
            f"conv or linear layer in the same module, or call resolve(in_channels=<input width "
            f"of that layer>) on it, or give this part of the model a fixed number, such as GN_32."
        )

    @_outside_graphs
    def _single_value(self, input: Tensor) -> None:
        message = (
            f"{self}: {self.num_groups} groups on an input of shape {tuple(input.shape)} leave one "
            f"value per group; normalized, every value is zero and nothing is learned. "
            f"Use fewer groups here (GN_1, or GN_<k> with k < {self.num_channels}) or larger maps."
        )
        if self.training:
            raise ValueError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, in_channels={self.in_channels}, "
            f"rule={self.rule!r}, eps={self.eps}, affine={self.affine}"
        )


def group_norm_from_name(name: str, num_channels: int) -> PracticalGroupNorm | None:
    """The unresolved norm that a config string names, or None if it names no norm of ours.

    ``GN_<RULE>`` selects a rule, such as ``GN_PRACTICAL`` or ``GN_UPTO_32``; ``GN_<k>`` a fixed
    number of groups.
    """
    rule = name.removeprefix("GN_").lower()
    if name in _RULE_NAMES or (name == f"GN_{rule.upper()}" and num_groups_of_width(rule, 1)):
        return PracticalGroupNorm(num_channels, rule=rule)
    fixed = re.fullmatch(r"GN_([1-9]\d*)", name)
    return PracticalGroupNorm(num_channels, rule=int(fixed[1])) if fixed else None


def norm_names() -> list[str]:
    """The config strings that :func:`group_norm_from_name` accepts."""
    return [*_RULE_NAMES, "GN_<number of groups>", "GN_UPTO_<k>", "GN_CPG_<n>"]


def unknown_norm_message(norm: object, others: list[str]) -> str:
    """Says that no norm has this name, and which there are: ours and ``others``."""
    valid = norm_names() + others
    near = difflib.get_close_matches(str(norm).upper(), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown norm {norm!r}; valid are {', '.join(valid)}.{hint}"
