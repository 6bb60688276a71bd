"""Whether tensors are what they seem."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether operations are compiled, traced, batched, faked or differentiated forward.

    Then a forward pass may run once for many calls, with tensors that hold no values, and with
    operations that only PyTorch's own can follow.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )
