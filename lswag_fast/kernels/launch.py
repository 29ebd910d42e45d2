"""Where a kernel is launched, and the block sizes that follow from a shape."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which Triton launches on `device`: it takes the current one, not that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << (n - 1).bit_length())
