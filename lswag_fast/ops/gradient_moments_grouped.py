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
from .gradient_moments_checks import DTYPES, accepted_tensor, checked, checked_weight, listed
from .gradient_moments_cpu import moments_on_cpu
from .moments import Convolution, GradientMoments, reduced

if TYPE_CHECKING:
    from ..kernels.gradient_moments_launch import Placed
    from ..kernels.gradient_moments_layout import Layout

_INFINITY_BITS = 0x7F800000
_ALIGNMENT = 16
"""Bytes that the kernels read at once where all pointers allow it: the remainder of a pointer is part of a layout."""
_OF_GRADIENTS = 14
"""The first numbers of a row, which no scale makes infinite that suits the gradients; the others are of the weight."""
_MOST_KINDS = 4096
"""Of a search space a few dozen come up, each of about a kilobyte."""


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
    weight: Tensor | None = None
    """The weight itself, for the saliencies that signed moments then have."""


class PendingMoments:
    """Moments that a device may still be computing. Operands must keep their values until `finish`."""

    def __init__(self, problems: Sequence[_Problem], done: Sequence[GradientMoments]) -> None:
        """Takes what `launch_gradient_moments` started, or the results where it computed them at once."""
        self._problems = problems
        self._done = list(done)
        self._launched = _launch([p.weight for p in problems], every_element=False) if problems else None

    @property
    def sums(self) -> Tensor | None:
        """What `finish` waits for, float64 [problems, 8 or (where any is signed) 16] on the device; None: nothing."""
        return None if self._launched is None else self._launched.results

    def finish(self, sums: Tensor | None = None) -> list[GradientMoments]:
        """Waits for the device and returns the moments in the order of the problems.

        One copy of 64 bytes a problem (128 where any is signed) brings all of them here; a caller that has copied
        `sums` to the host already gives the copy, and nothing waits. A problem whose scale, found on a sample of its
        operands, was so wrong that sums overflowed or vanished is computed again from a look at all elements, with a
        wait of its own.
        """
        if self._launched is not None:
            rows = (self._launched.results if sums is None else sums).tolist()
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


@dataclass(frozen=True, eq=False)
class _Kind:
    """What is known of a problem from the layouts of its operands alone, which have been checked."""

    layout: Layout
    shape: tuple[int, ...]
    groups: int
    group_size: int
    copied: bool
    """Whether tokens of an operand span several dimensions that only a copy merges."""


_KINDS: dict[tuple[Any, ...], _Kind] = {}


@dataclass(frozen=True, eq=False)
class _Problem:
    kind: _Kind
    weight: Placed

    def moments(self, row: Sequence[float]) -> GradientMoments:
        kind, signed = self.kind, self.kind.layout.form.signed
        sums = _all_or_nan(row[:5])
        if signed:
            sums += [*_all_or_nan(row[8:13]), *row[13:]]
        maps = [] if self.weight.maps is None else [m.view(kind.shape) for m in self.weight.maps]
        numel, with_weight = math.prod(kind.shape), self.weight.values is not None
        return reduced(
            tuple(sums), int(row[5]), kind.group_size, numel, kind.groups, signed, maps, with_weight=with_weight
        )


class PreparedProblem:
    """A problem to be launched again and again on other values of the same tensors, which stay where they lie."""

    def __init__(self, problem: MomentProblem) -> None:
        """Takes a problem, of which neither a tensor nor its place or layout changes from now on."""
        self.problem = problem
        self._known: dict[bool, _Problem] = {}

    def launchable(self, wgmma: bool) -> _Problem:
        """Returns the problem as it is launched: worked out once, unless each launch makes something of it anew."""
        found = self._known.get(wgmma)
        if found is None:
            found = _problem(self.problem, wgmma)
            given = (*_listed(self.problem.inputs), *_listed(self.problem.output_grads))
            views = all(any(t is g for g in given) for t in found.weight.operands)
            weight, values = self.problem.weight, found.weight.values
            views &= weight is None or values is None or values.data_ptr() == weight.data_ptr()
            if found.weight.maps is None and views:
                self._known[wgmma] = found
        return found


def launch_gradient_moments(problems: Sequence[MomentProblem | PreparedProblem]) -> PendingMoments:
    """Starts the moments of every problem on the device of their tensors, without waiting for any.

    On a CUDA device all problems share one launch for each way to read operands (dtype, alignment, convolution), on the
    current stream; a problem's result has the same bits whatever shares it. With LSWAG_BACKEND=cuda, a Hopper GPU takes
    the CUDA C++ kernel (csrc/cuda/gradient_moments.cuh) for 16-bit operands of linear weights used once, whose widths,
    strides and addresses are multiples of 16 bytes, where neither signed moments nor maps are asked for, nor two or
    three groups in float16; its sums differ from Triton's in the last bits. Device memory beyond operands and maps is
    about 0.6 KB a problem and 40 bytes a tile of 64 x 128 weights or so (104 where signed), copies of operands whose
    tokens span several dimensions that cannot be merged, and of weights whose taps and channels cannot. A CUDA graph
    can capture it, once a launch of the same layouts has been made outside one; `sums` then holds the results of its
    last replay. On the CPU everything is computed before this returns.

    Raises:
        InputError: what `gradient_moments` refuses, tensors on several devices, samples that span 2^31 elements.
    """
    if not problems:
        return PendingMoments([], [])
    device = _tensors("inputs", _unprepared(problems[0]).inputs)[0].device
    implementation = backends.implementation("gradient_moments", device.type)
    if implementation in ("triton", "cuda"):
        wgmma = implementation == "cuda" and _has_wgmma(device)
        launchable = [p.launchable(wgmma) if isinstance(p, PreparedProblem) else _problem(p, wgmma) for p in problems]
        _check_one_device(device, [p.weight.operands[0] for p in launchable])
        return PendingMoments(launchable, [])
    taken = [_taken(_unprepared(p)) for p in problems]
    _check_one_device(device, [a[0] for _, (a, *_), _ in taken])
    done = [
        moments_on_cpu(*operands, p.convolution, signed=p.signed, maps=p.maps, weight=weight)
        for p, operands, weight in taken
    ]
    return PendingMoments([], done)


def gradient_moments_grouped(problems: Sequence[MomentProblem | PreparedProblem]) -> list[GradientMoments]:
    """Returns the moments of every problem: `launch_gradient_moments(problems).finish()`."""
    return launch_gradient_moments(problems).finish()


def _launch(weights: Sequence[Placed], *, every_element: bool):  # type: ignore[no-untyped-def]
    from ..kernels.gradient_moments_launch import launch

    return launch(weights, every_element=every_element)


def _certain(row: Sequence[float]) -> bool:
    """Tells whether a scale made of a sample was right: sums are finite, and neither operand looked like zeros."""
    return math.isfinite(sum(row[:_OF_GRADIENTS])) and 0 < row[6] < _INFINITY_BITS and 0 < row[7] < _INFINITY_BITS


def _all_or_nan(counted: Sequence[float]) -> list[float]:
    """Returns a count and the sums over it, all of which are NaN where one is not finite."""
    count, *sums = counted
    return [count, *(sums if all(map(math.isfinite, sums)) else [math.nan] * len(sums))]


def _tensors(name: str, given: Any) -> list[Tensor]:
    """Returns the tensors of an argument; most can be read as they are."""
    tensors = _listed(given)
    return tensors if tensors and all(map(_is_plain, tensors)) else listed(name, given)


def _tensor(name: str, given: Any) -> Tensor:
    return given if _is_plain(given) else accepted_tensor(name, given, DTYPES)


def _is_plain(given: Any) -> bool:
    """Tells whether memory holds the values of a tensor, and it holds no graph."""
    if not isinstance(given, Tensor) or given.layout is not torch.strided:
        return False
    return not (given.requires_grad or given.is_neg())


def _check_one_device(device: torch.device, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device != device:
            raise InputError(f"expected all problems on one device, got {device} and {tensor.device}")


def _has_wgmma(device: torch.device) -> bool:
    from ..kernels.gradient_moments_launch import has_wgmma

    return has_wgmma(device)


def _unprepared(problem: MomentProblem | PreparedProblem) -> MomentProblem:
    return problem.problem if isinstance(problem, PreparedProblem) else problem


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _taken(
    problem: MomentProblem,
) -> tuple[MomentProblem, tuple[list[Tensor], list[Tensor], int, tuple[int, ...]], Tensor | None]:
    """Returns a problem, its operands, groups and shape of the weight, and the weight, all of them checked."""
    operands = checked(*_operands(problem), problem.groups, problem.convolution)
    return problem, operands, _checked_weight(problem, operands[0][0], operands[3])


def _checked_weight(problem: MomentProblem, operand: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    return None if problem.weight is None else checked_weight(problem.weight, shape, problem.signed, operand.device)


def _operands(problem: MomentProblem) -> tuple[list[Tensor], list[Tensor]]:
    return _tensors("inputs", problem.inputs), _tensors("output_grads", problem.output_grads)


def _problem(problem: MomentProblem, wgmma: bool) -> _Problem:
    """Returns a problem as it is launched; it is checked where none with operands of these layouts has been."""
    from ..kernels.gradient_moments_launch import Placed

    a, d = _operands(problem)
    layouts = [(t.dtype, t.shape, t.stride(), t.data_ptr() % _ALIGNMENT, t.device) for t in (*a, *d)]
    w = None if problem.weight is None else _tensor("weight", problem.weight)
    of_weight = None if w is None else (w.dtype, w.shape, w.stride(), w.device)
    asked = (problem.signed, problem.maps, problem.tf32, of_weight)
    key = (len(a), *layouts, problem.groups, problem.convolution, *asked, wgmma)
    kind = _KINDS.get(key)
    if kind is None:
        if len(_KINDS) >= _MOST_KINDS:
            _KINDS.clear()
        kind = _KINDS[key] = _kind(problem, a, d, wgmma)
    operands = [t for pair in zip(a, d, strict=True) for t in pair]
    if kind.copied:
        operands = [_line(t, None) for t in operands]
    maps = None
    if problem.maps:
        count = 5 if problem.signed else 2
        maps = torch.empty(count, math.prod(kind.shape), dtype=torch.float64, device=a[0].device)
    values = None if w is None else _matrix(w)
    return _Problem(kind, Placed(kind.layout, operands, maps, values))


def _kind(problem: MomentProblem, a: list[Tensor], d: list[Tensor], wgmma: bool) -> _Kind:
    """Checks a problem and works out what its layouts say of it."""
    from ..kernels.gradient_moments_launch import architecture_of
    from ..kernels.gradient_moments_layout import Weight, layout_of

    c = problem.convolution
    inputs, output_grads, groups, shape = checked(a, d, problem.groups, c)
    values = _checked_weight(problem, inputs[0], shape)
    if c is None or _is_linear(c, inputs, output_grads):
        inputs, output_grads = ([_line(t, c) for t in tensors] for tensors in (inputs, output_grads))
        c = None
    copied = any(view.data_ptr() != t.data_ptr() for view, t in zip((*inputs, *output_grads), (*a, *d), strict=True))
    c = c or Convolution((1, 1))
    weight = Weight(
        inputs,
        output_grads,
        groups,
        c.kernel_size,
        c.stride,
        c.padding,
        c.dilation,
        c.groups,
        tf32=problem.tf32,
        signed=problem.signed,
        maps=problem.maps,
        value_type=None if values is None else values.dtype,
    )
    layout = layout_of(weight, architecture_of(a[0].device), wgmma=wgmma)
    return _Kind(layout, shape, groups, len(a[0]) // groups, copied)


def _is_linear(c: Convolution, a: list[Tensor], d: list[Tensor]) -> bool:
    pointwise = (c.kernel_size, c.stride, c.padding, c.groups) == ((1, 1), (1, 1), (0, 0), 1)
    planes = [t.shape[2:] for t in (*a, *d)]
    lines = all(t.stride(2) == t.shape[3] * t.stride(3) for t in (*a, *d))
    return pointwise and lines and len(set(planes)) == 1


def _matrix(weight: Tensor) -> Tensor:
    """Returns [O, I * taps], a view where there is one in which places can be counted in 32 bits."""
    matrix = weight.reshape(weight.shape[0], -1)
    reach = sum((n - 1) * abs(step) for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix if reach < 2**31 else matrix.contiguous()


def _line(tensor: Tensor, convolution: Convolution | None) -> Tensor:
    """Returns [S, C, 1, T], a view wherever the tokens can be merged into one dimension."""
    if convolution is not None:
        return tensor.flatten(2).unsqueeze(2)
    tensor = tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
    return tensor.transpose(1, 2).unsqueeze(2)
