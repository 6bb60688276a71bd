"""Where a run computes, and how precisely."""

from __future__ import annotations

import torch

from gnpractical.runs.errors import first_line


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"--device must be a device of this machine, got {name!r} "
            f"({first_line(e)}). Use --device cpu."
        ) from None


def precision(device: torch.device, mixed: bool) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """For mixed precision bfloat16, or float16 with scaled losses where a GPU has no bfloat16."""
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if native else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=mixed and not native)
    return torch.autocast(device.type, dtype, enabled=mixed), scaler
