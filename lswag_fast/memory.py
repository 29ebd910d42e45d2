"""Where operations put their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Empty(Protocol):
    """Gives memory for a result: `torch.empty`, or something that hands out the same places again."""

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a contiguous tensor of this size, its values left open."""
        ...


def empty_like(tensor: Tensor, empty: Empty) -> Tensor:
    """Returns a tensor of the same size, dtype and device; of the same strides too, then in new memory."""
    if not tensor.is_contiguous():
        return torch.empty_like(tensor)
    return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
