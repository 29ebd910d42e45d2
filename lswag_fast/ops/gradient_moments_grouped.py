"""Moments of the gradients of many weights at once: all layers of a candidate, or of many, in a few launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..errors import InputError
from .gradient_moments import Convolution, GradientMoments, checked, gradient_moments, reduced

if TYPE_CHECKING:
    from ..kernels.gradient_moments_launch import Weight

_INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class MomentProblem:
    """One weight, with the arguments that `gradient_moments` takes."""

    inputs: Tensor | Sequence[Tensor]
    output_grads: Tensor | Sequence[Tensor]
    groups: int | None = None
    convolution: Convolution | None = None
    signed: bool = False
    maps: bool = False
    tf32: bool = False
    """Multiply float32 operands in TF32, which keeps 10 bits of them; the CPU has no such type and uses float32."""


class PendingMoments:
    """Moments that a device may still be computing. Operands must keep their values until `finish`."""

    def __init__(self, problems: Sequence[_Problem], done: Sequence[GradientMoments]) -> None:
        """Takes what `launch_gradient_moments` started, or the results where it computed them at once."""
        self._problems = problems
        self._done = list(done)
        self._launched = _launch([p.weight for p in problems], every_element=False) if problems else None

    def finish(self) -> list[GradientMoments]:
        """Waits for the device and returns the moments in the order of the problems.

        One copy of 64 bytes a problem (112 where any is signed) brings all of them here. A problem whose scale, found
        on a sample of its operands, was so wrong that sums overflowed or vanished is computed again from a look at all
        elements: a second wait.
        """
        if self._launched is not None:
            rows = self._launched.results.tolist()
            again = [
                n
                for n, (row, seen) in enumerate(zip(rows, self._launched.everything_seen, strict=True))
                if not seen and not _certain(row)
            ]
            if again:
                repeated = _launch([self._problems[n].weight for n in again], every_element=True).results.tolist()
                for n, row in zip(again, repeated, strict=True):
                    rows[n] = row
            self._done = [p.moments(row) for p, row in zip(self._problems, rows, strict=True)]
            self._launched, self._problems = None, []
        return self._done


@dataclass(frozen=True)
class _Problem:
    weight: Weight
    shape: tuple[int, ...]

    def moments(self, row: Sequence[float]) -> GradientMoments:
        weight = self.weight
        sums = _all_or_nan(row[:5])
        if weight.signed:
            *signed, signs = row[8:14]
            sums += [*_all_or_nan(signed), signs]
        samples, groups = len(weight.inputs[0]), weight.groups
        maps = [] if weight.maps is None else [m.view(self.shape) for m in weight.maps]
        numel = math.prod(self.shape)
        return reduced(tuple(sums), int(row[5]), samples // groups, numel, groups, weight.signed, maps)


def launch_gradient_moments(problems: Sequence[MomentProblem]) -> PendingMoments:
    """Starts the moments of every problem on the device of their tensors, without waiting for any.

    On a CUDA device all problems share one launch for each way to read operands (dtype, alignment, convolution), on the
    current stream; a problem's result has the same bits whatever shares it. Device memory beyond operands and maps is
    about 0.6 KB a problem and 40 bytes a tile of 64 x 128 weights or so (88 where signed), and copies of operands whose
    tokens span several dimensions that cannot be merged. On the CPU everything is computed before this returns.

    Raises:
        InputError: what `gradient_moments` refuses, tensors on several devices, samples that span 2^31 elements.
    """
    if not problems:
        return PendingMoments([], [])
    taken = [checked(p.inputs, p.output_grads, p.groups, p.convolution) for p in problems]
    device = taken[0][0][0].device
    for a, *_ in taken:
        if a[0].device != device:
            raise InputError(f"expected all problems on one device, got {device} and {a[0].device}")
    if backends.implementation("gradient_moments", device.type) != "triton":
        done = [
            gradient_moments(a, d, groups, convolution=p.convolution, signed=p.signed, maps=p.maps)
            for p, (a, d, groups, _) in zip(problems, taken, strict=True)
        ]
        return PendingMoments([], done)
    from ..kernels.gradient_moments_launch import Weight

    return PendingMoments([_problem(Weight, p, *found) for p, found in zip(problems, taken, strict=True)], [])


def gradient_moments_grouped(problems: Sequence[MomentProblem]) -> list[GradientMoments]:
    """Returns the moments of every problem: `launch_gradient_moments(problems).finish()`."""
    return launch_gradient_moments(problems).finish()


def _launch(weights: Sequence[Weight], *, every_element: bool):  # type: ignore[no-untyped-def]
    from ..kernels.gradient_moments_launch import launch

    return launch(weights, every_element=every_element)


def _certain(row: Sequence[float]) -> bool:
    """Tells whether a scale made of a sample was right: sums are finite, and neither operand looked like zeros."""
    sums, magnitudes, signed_sums = row[:5], row[6:8], row[8:]
    return all(map(math.isfinite, (*sums, *signed_sums))) and all(0 < bits < _INFINITY_BITS for bits in magnitudes)


def _all_or_nan(counted: Sequence[float]) -> list[float]:
    """Returns a count and the sums over it, all of which are NaN where one is not finite."""
    count, *sums = counted
    return [count, *(sums if all(map(math.isfinite, sums)) else [math.nan] * len(sums))]


def _problem(
    make: type[Weight], problem: MomentProblem, a: list[Tensor], d: list[Tensor], groups: int, shape: tuple[int, ...]
) -> _Problem:
    kept, maps = 5 if problem.signed else 2, None
    if problem.maps:
        maps = torch.empty(kept, math.prod(shape), dtype=torch.float64, device=a[0].device)
    asked: dict[str, Any] = {"tf32": problem.tf32, "signed": problem.signed, "maps": maps}
    c = problem.convolution
    if c is None or _is_linear(c, a, d):
        lines = [[_line(t, c) for t in tensors] for tensors in (a, d)]
        return _Problem(make(lines[0], lines[1], groups, **asked), shape)
    weight = make(a, d, groups, c.kernel_size, c.stride, c.padding, c.dilation, c.groups, **asked)
    return _Problem(weight, shape)


def _is_linear(c: Convolution, a: list[Tensor], d: list[Tensor]) -> bool:
    pointwise = (c.kernel_size, c.stride, c.padding, c.groups) == ((1, 1), (1, 1), (0, 0), 1)
    planes = [t.shape[2:] for t in (*a, *d)]
    lines = all(t.stride(2) == t.shape[3] * t.stride(3) for t in (*a, *d))
    return pointwise and lines and len(set(planes)) == 1


def _line(tensor: Tensor, convolution: Convolution | None) -> Tensor:
    """Returns [S, C, 1, T], a view wherever the tokens can be merged into one dimension."""
    if convolution is not None:
        return tensor.flatten(2).unsqueeze(2)
    if tensor.ndim != 3:
        tensor = tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
    # One view rather than two: a candidate has a hundred operands.
    (samples, tokens, channels), (sample, token, channel) = tensor.shape, tensor.stride()
    return tensor.as_strided((samples, channels, 1, tokens), (sample, channel, 0, token))
