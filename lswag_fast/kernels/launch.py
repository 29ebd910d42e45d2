"""Where and how a kernel is launched, and the block sizes that follow from a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel: products and sums become fused multiply-adds, the default of some versions of Triton only."""
ALIGNMENT = 16
"""Bytes; Triton compiles a kernel of its own for pointers that are no multiples."""
MOST_LAUNCHES = 4096
"""Of one kernel, that are kept; of a search space some dozens come up."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which Triton launches on `device`: it takes the current one, not that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << (n - 1).bit_length())


class Launch:
    """A kernel and its arguments but the tensors, which come first in its signature.

    Triton looks for the compiled kernel of every argument's type, value and alignment at each launch, which takes the
    host longer than many a kernel takes the device. Whoever keeps a launch promises tensors of the same dtypes, None in
    the same places; then only pointers can differ, and where they are aligned the kernel of the first such launch is
    started without a look at anything else.

    Args:
        kernel: what triton.jit made.
        device: of the tensors.
        arguments: by name, constants and `num_warps` and `num_stages` among them.
        programs: of the grid, at least 1; None where they differ from launch to launch.
    """

    def __init__(
        self, kernel: Any, device: torch.device, arguments: Mapping[str, Any], programs: int | None = None
    ) -> None:
        self._kernel, self._device = kernel, device
        self._programs = programs
        self._arguments = {**arguments, **OPTIONS}
        self._compiled: Any = None  # the whole of it: where it goes, Triton unloads its function
        self._last = tuple(self._arguments[name] for name in kernel.arg_names if name in self._arguments)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the kernel on the current stream of the device."""
        assert self._programs is not None
        self.start((self._programs, 1), tensors)

    def start(self, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int] = ()) -> None:
        """Starts the kernel on another grid, with numbers behind the tensors that it is not specialised for."""
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = reduce(or_, filter(None, pointers), 0) % ALIGNMENT == 0
        if self._compiled is not None and aligned and not _watched():
            device = driver.active.get_current_device()
            if device == (self._device.index or 0):
                _, run, function, metadata = self._compiled
                stream = driver.active.get_current_stream(device)
                # Neither launch metadata nor hooks.
                run(*grid, 1, stream, function, metadata, None, None, None, *pointers, *numbers, *self._last)
                return
        with on(self._device):
            made = self._kernel[grid](*tensors, *numbers, **self._arguments)
        if aligned and hasattr(made, "packed_metadata"):  # interpreted, a launch returns nothing
            self._compiled = made, made.run, made.function, made.packed_metadata


def _watched() -> bool:
    """Whether a profiler wants to be called at each launch."""
    runtime: Any = triton.knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", ()) or getattr(runtime.launch_exit_hook, "calls", ()))
