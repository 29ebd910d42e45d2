"""One compiled form of a Triton kernel, as its launch code asks for it, so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one of its launches."""

    name: str
    kernel: Any
    """What triton.jit made."""
    types: Mapping[str, str]
    """Triton's type of each run-time argument ("*bf16", "i32"); ":16" after it where it is divisible by 16.

    An argument that is neither here nor among the constants is None.
    """
    constants: Mapping[str, Any]
    """The values of the constexpr arguments."""
    warps: int
    stages: int
    matrix: bool = False
    """Whether it multiplies matrices: then the machine code must hold tensor-core instructions."""
    pipelined: bool = False
    """Whether its loads must be copied asynchronously, `stages` tiles ahead."""
    architectures: tuple[int, ...] = (80, 90)
    """The compute capabilities, times ten, that it is launched on."""
