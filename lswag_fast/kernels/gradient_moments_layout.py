"""What the tables of the gradient-moments kernels hold of a weight whatever lies at its addresses, worked out once.

A score launches some sixty weights of a few dozen layouts, and the next candidate the same ones again: a launch copies
their rows and fills in addresses, places and numbers (gradient_moments_launch.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .gradient_moments import moments_of_tiles
from .gradient_moments_depthwise import moments_of_depthwise
from .gradient_moments_shared import OPERAND_FIELDS, PROBLEM_FIELDS, SIGNED_SUMS, SUMS, USE_FIELDS
from .gradient_moments_tiles import FLOAT64, HALF, IEEE, TF32, WGMMA_TILE, Tile, depthwise_tile, tile_for
from .gradient_moments_windows import moments_of_windows
from .launch import power_of_two

FEW_GROUPS = 3
WGMMA = "wgmma"
"""In place of a Triton kernel: the CUDA C++ one."""
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
Rows = NDArray[np.int64]
MOST_TILE_BYTES = 60 * 2**20
_LIMIT = 2**31


def sums_of(signed: bool) -> int:
    """Returns how many float64 sums a tile has."""
    return int(SUMS.value + signed * SIGNED_SUMS.value)


@dataclass(frozen=True)
class Weight:
    """One weight: its uses as views with four dimensions, and how they are combined.

    inputs [S, C, H, W] and output_grads [S, O, OH, OW] in float32, bfloat16 or float16, any strides.
    """

    inputs: Sequence[Tensor]
    output_grads: Sequence[Tensor]
    groups: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    channel_groups: int = 1
    tf32: bool = False
    signed: bool = False
    maps: bool = False
    value_type: torch.dtype | None = None
    """Of the weight itself, where saliencies are asked for, which come with signed moments."""

    @property
    def depthwise(self) -> bool:
        """Whether a channel group has one input channel: then the whole weight is one matrix, a row an output."""
        return self.inputs[0].shape[1] == self.channel_groups > 1

    @property
    def planes(self) -> int:
        """How many matrices the weight is, one below the other: channel groups."""
        return 1 if self.depthwise else self.channel_groups

    @property
    def height(self) -> int:
        """Rows of one matrix of the weight."""
        return self.output_grads[0].shape[1] // self.planes

    @property
    def width(self) -> int:
        """Columns of the weight: input channels of a group times the taps of its kernel."""
        return self.inputs[0].shape[1] // self.channel_groups * math.prod(self.kernel)


@dataclass(frozen=True, eq=False)
class Form:
    """Which compiled kernel a weight takes: decided by its own layout alone, whatever shares the launch.

    Weights of one form hold the same object.
    """

    kernel: Any
    tile: Tile
    a_type: torch.dtype
    d_type: torch.dtype
    kind: str
    unit: int
    maps: bool
    signed: bool
    value_type: torch.dtype | None

    @property
    def of_lines(self) -> bool:
        """Whether the kernel takes linear weights used once and counts in units, rather than windows."""
        return self.kernel is moments_of_tiles or self.kernel is WGMMA

    @property
    def sums(self) -> int:
        """How many rows of sums a tile has: with wgmma one for each half, which a warpgroup of its own works on."""
        return 2 if self.kernel is WGMMA else 1


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of a weight, 0 where a launch fills in."""

    form: Form
    tiles: int
    """Rows of sums: one a tile, or `form.sums`."""
    steps: int
    """Chunks of rows that a tile takes, for the order of tiles."""
    problem: Rows
    """[1, PROBLEM_FIELDS]."""
    uses: Rows
    """[uses, USE_FIELDS]; what the two pointers are divided by stands in their place."""
    operands: Rows
    """[2 * uses, OPERAND_FIELDS], inputs and output gradients in turn; the number of elements stands for `every`."""
    types: tuple[int, ...]
    """The type of each operand, a number in TYPES."""


def layout_of(weight: Weight, architecture: int, tile: Tile | None = None, *, wgmma: bool = False) -> Layout:
    """Returns the layout of a weight for a compute capability times ten (0: interpreted), with the committed tile.

    With `wgmma`, weights that the CUDA C++ kernel takes have its form: 16-bit operands whose pointers, widths and
    strides are multiples of 16 bytes, moments of |g| alone.

    Raises InputError for a tensor with an element 2^31 or more away from its sample's first, or such a weight (2^29
    where signed moments or maps are asked for in two or three groups).
    """
    _check_extent(weight)
    form = _form_of(weight, architecture, wgmma)
    if tile is not None:
        form = replace(form, tile=tile)
    in_plane = -(-weight.height // form.tile.rows) * -(-weight.width // form.tile.columns) * form.sums
    if in_plane * weight.planes * sums_of(form.signed) * 8 > MOST_TILE_BYTES:
        raise InputError(
            f"expected a weight whose sums of tiles fit 60 MiB, got [{weight.height}, {weight.width}] with signed = "
            f"{weight.signed}, maps = {weight.maps}; ask for fewer of them, or pass fewer output channels at a time"
        )
    chunks = sum(-(-d.shape[2] * d.shape[3] // form.tile.chunk) for d in weight.output_grads)
    operands = [t for pair in zip(weight.inputs, weight.output_grads, strict=True) for t in pair]
    return Layout(
        form,
        in_plane * weight.planes,
        len(weight.inputs[0]) * chunks,
        _table([_problem(weight, form, in_plane)], PROBLEM_FIELDS.value),
        _table(_uses(weight, form), USE_FIELDS.value),
        _table([_operand(tensor, number % 2) for number, tensor in enumerate(operands)], OPERAND_FIELDS.value),
        tuple(list(TYPES).index(tensor.dtype) for tensor in operands),
    )


def _table(rows: Sequence[Sequence[int]], fields: int) -> Rows:
    return np.array([[*row, *[0] * (fields - len(row))] for row in rows], dtype=np.int64)


def _check_extent(weight: Weight) -> None:
    if weight.height * weight.width * weight.planes >= _LIMIT:
        raise InputError(f"expected a weight of fewer than 2^31 elements, got [{weight.height}, {weight.width}]")
    for name, tensors in (("inputs", weight.inputs), ("output_grads", weight.output_grads)):
        for tensor in tensors:
            # A chunk of rows beyond the last is addressed, though never read.
            reach = sum((n + 128) * abs(s) for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True) if n > 1)
            if max(reach, abs(tensor.stride(0))) >= _LIMIT:
                raise InputError(
                    f"expected {name} whose samples span fewer than 2^31 elements, got shape {list(tensor.shape)} "
                    f"with strides {list(tensor.stride())}; pass them contiguous, or fewer tokens at a time"
                )


def _kind(weight: Weight) -> str:
    types = {t.dtype for t in (*weight.inputs, *weight.output_grads)}
    if weight.groups <= FEW_GROUPS and types != {torch.bfloat16} and not weight.tf32:
        return FLOAT64
    if len(types) == 1 and types != {torch.float32}:
        return HALF
    return TF32 if weight.tf32 else IEEE


def _form_of(weight: Weight, architecture: int, wgmma: bool) -> Form:
    a, d = weight.inputs[0], weight.output_grads[0]
    linear = (weight.kernel, weight.stride, weight.padding) == ((1, 1), (1, 1), (0, 0)) and weight.channel_groups == 1
    rows_in_line = a.shape[2] == d.shape[2] == 1
    contiguous = a.stride(1) == 1 and d.stride(1) == 1
    windows = not (linear and rows_in_line and contiguous and len(weight.inputs) == 1 and a.dtype == d.dtype)
    kind, unit = _kind(weight), 1 if windows else _unit(a, d)
    if weight.depthwise:
        kind = kind if kind == FLOAT64 else IEEE
        kernel, tile = moments_of_depthwise, depthwise_tile(architecture, kind, weight.width)
    else:
        kernel = moments_of_windows if windows else moments_of_tiles
        tile = tile_for(architecture, kind, windows=windows, unit=unit, signed=weight.signed, maps=weight.maps)
    plain = kernel is moments_of_tiles and kind == HALF and unit == 8 and not weight.signed and not weight.maps
    if wgmma and plain and d.shape[3] > 0:
        kernel, tile = WGMMA, WGMMA_TILE
    return _form(kernel, tile, a.dtype, d.dtype, kind, unit, weight.maps, weight.signed, weight.value_type)


@cache
def _form(*fields: Any) -> Form:
    return Form(*fields)


def _unit(a: Tensor, d: Tensor) -> int:
    """Returns how many elements every pointer, width and stride is a multiple of: 16 bytes, 8, or one element."""
    size = a.element_size()
    numbers = [n for t in (a, d) for n in (t.shape[1], t.stride(0), t.stride(3))]
    for unit in (8, 4) if size == 2 else (4,):
        if all(n % unit == 0 for n in numbers) and all(t.data_ptr() % (unit * size) == 0 for t in (a, d)):
            return unit
    return 1


def _loop(weight: Weight) -> tuple[int, int, int]:
    """Returns samples a group, rows a sample and samples as the kernel takes them.

    The samples of a group are one long sample where their rows follow one another at the same distance: a chunk of
    rows is then filled across samples.
    """
    a, d = weight.inputs[0], weight.output_grads[0]
    rows, in_group = d.shape[2] * d.shape[3], len(a) // weight.groups
    joined = all(t.stride(0) == rows * t.stride(3) for t in (a, d))
    return (1, rows * in_group, in_group) if joined and in_group * rows < _LIMIT // 256 else (in_group, rows, 1)


def _problem(weight: Weight, form: Form, in_plane: int) -> list[int]:
    group_size = len(weight.inputs[0]) // weight.groups
    in_group = _loop(weight)[0] if form.of_lines else group_size
    first_use = first_tile = slot = maps_at = 0
    return [
        weight.height // form.unit,
        weight.width // form.unit,
        weight.groups,
        in_group,
        first_use,
        len(weight.inputs),
        first_tile,
        slot,
        in_plane * weight.planes,
        maps_at,
        int(weight.signed),
        group_size,
        weight.dilation[1],
        weight.height,
        weight.width,
        in_plane,
        *weight.kernel,
        *weight.stride,
        *weight.padding,
        weight.dilation[0],
        weight.height // weight.channel_groups,
    ]


def _uses(weight: Weight, form: Form) -> list[list[int]]:
    rows = []
    for a, d in zip(weight.inputs, weight.output_grads, strict=True):
        count, joined, bytes_to_unit = d.shape[2] * d.shape[3], 1, 1
        if form.of_lines:
            _, count, joined = _loop(weight)
            bytes_to_unit = form.unit * a.element_size()
        numbers = []
        for tensor in (a, d):
            sample, channel, y, x = tensor.stride()
            numbers += [bytes_to_unit, sample * joined // form.unit, x // form.unit, y, channel, *tensor.shape[2:]]
        rows.append([*numbers, count, min(form.tile.chunk, power_of_two(d.shape[3]))])
    return rows


def _operand(tensor: Tensor, side: int) -> list[int]:
    # Neighbours in memory are neighbours in the last dimension; a broadcast dimension is looked at once.
    sizes = [(n if s else 1, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    sizes.sort(key=lambda pair: (pair[0] > 1, -pair[1]))
    return [0, *(n for n, _ in sizes), *(s for _, s in sizes), tensor.numel(), side]
