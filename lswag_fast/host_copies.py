"""Numbers of a device on their way to the host."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies of tensors in the host's memory, from a CUDA device under way since this was made.

    One wait brings all of them, and it is for them alone: work that their stream was given afterwards goes on.
    Tensors on the CPU are taken as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        self._arrived: Any = None
        with nullcontext() if device is None else torch.cuda.device(device):
            self._copies = {name: _pinned(t) if t.is_cuda else t for name, t in tensors.items()}
            if device is not None:
                self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._arrived.record()

    def wait(self) -> dict[str, Tensor]:
        """Returns the copies by name, once they are all here."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._copies


def _pinned(tensor: Tensor) -> Tensor:
    # A copy to memory that the system may move would have the host wait.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
