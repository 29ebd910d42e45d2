"""Turns a list of weights into the tables of the gradient-moments kernels, and launches them.

A launch makes one table on the host, copies it once, and starts three to a handful of kernels; nothing is read back
before `finish`. Programs hold their tiles in registers: beyond operands there are the table (about 0.5 KB a weight)
and 40 bytes a tile, 88 where signed moments are asked for.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..errors import InputError
from .gradient_moments import moments_of_tiles
from .gradient_moments_depthwise import moments_of_depthwise
from .gradient_moments_shared import OPERAND_FIELDS, largest_magnitudes, sums_of_tiles
from .gradient_moments_tiles import FLOAT64, HALF, IEEE, TF32, Tile, depthwise_tile, tile_for
from .gradient_moments_variants import MAGNITUDE_BLOCK, SUMS_BLOCK, constants_of, without_product
from .gradient_moments_windows import moments_of_windows
from .launch import power_of_two

FEW_GROUPS = 3
SAMPLED_ELEMENTS = 1 << 16
"""Of an operand, for its scale: 0.1 to 2 % of what the moments read."""
MAGNITUDE_PROGRAMS = 8
_LIMIT = 2**31
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


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
    maps: Tensor | None = None
    """Where the maps go, float64 [2 or (signed) 5, numel] in the order of MomentMaps, contiguous; or None."""

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


@dataclass(frozen=True)
class _Form:
    """Which compiled kernel a weight takes: decided by its own layout alone, whatever shares the launch."""

    kernel: Any
    tile: Tile
    a_type: torch.dtype
    d_type: torch.dtype
    kind: str
    unit: int
    maps: bool
    signed: bool


@dataclass
class _Plan:
    form: _Form
    slots: list[int] = field(default_factory=list)
    end_tile: int = 0
    """Tiles are numbered through all plans; this one's end before it."""


@dataclass(frozen=True)
class Launched:
    """What runs on the device, and the operands it reads: `results` are float64 [weights, 8 or (signed) 14]."""

    results: Tensor
    weights: Sequence[Weight]
    everything_seen: Sequence[bool]
    held: Sequence[Tensor | None]


def launch(weights: Sequence[Weight], *, every_element: bool = False) -> Launched:
    """Starts the kernels on the current stream of the weights' device, without waiting for them.

    `every_element` looks at all elements for the scales, rather than at lines of SAMPLED_ELEMENTS.

    Raises InputError for a tensor with an element 2^31 or more away from its sample's first, or such a weight.
    """
    for weight in weights:
        _check_extent(weight)
    return _start(weights, _plans(weights, _architecture(weights[0].inputs[0].device)), every_element=every_element)


def _start(weights: Sequence[Weight], plans: Sequence[_Plan], *, every_element: bool) -> Launched:
    device = weights[0].inputs[0].device
    table, pieces, seen = _table(weights, plans, every_element)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if device.type == "cuda":
            table = table.pin_memory()
        on_device = table.to(device, non_blocking=True)
        sections = [on_device[begin:end] for begin, end in pieces]
        problems, uses, ends, operands, slots = sections
        magnitudes = slots.view(torch.int32)
        partials = torch.empty(plans[-1].end_tile * 5, dtype=torch.float64, device=device)
        signed = any(weight.signed for weight in weights)
        signed_partials = torch.empty(plans[-1].end_tile * 6, dtype=torch.float64, device=device) if signed else None
        results = torch.empty(len(weights), 14 if signed else 8, dtype=torch.float64, device=device)
        _find_magnitudes(weights, operands, magnitudes)
        _work_through(plans, (problems, uses, ends, magnitudes, partials), signed_partials, device)
        sums_of_tiles[(len(weights),)](
            problems, magnitudes, partials, signed_partials, results, BLOCK=SUMS_BLOCK, SIGNED=signed, num_warps=4
        )
    return Launched(results, weights, seen, (table, on_device, partials, signed_partials))


def workspace_bytes(weights: Sequence[Weight]) -> int:
    """Returns the device memory that a launch takes beside operands and maps."""
    device = weights[0].inputs[0].device
    plans = _plans(weights, _architecture(device))
    table, _, _ = _table(weights, plans, every_element=False)
    tile, weight = (88, 112) if any(w.signed for w in weights) else (40, 64)
    return table.numel() * 8 + plans[-1].end_tile * tile + len(weights) * weight


@cache
def _device_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return _device_facts(device.index if device.index is not None else torch.cuda.current_device())[0]


def _programs(device: torch.device, tile: Tile, tiles: int) -> int:
    if device.type != "cuda":
        return min(tiles, 3)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return min(tiles, _device_facts(index)[1] * tile.residents)


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


def _form(weight: Weight, architecture: int) -> _Form:
    a, d = weight.inputs[0], weight.output_grads[0]
    linear = (weight.kernel, weight.stride, weight.padding) == ((1, 1), (1, 1), (0, 0)) and weight.channel_groups == 1
    rows_in_line = a.shape[2] == d.shape[2] == 1
    contiguous = a.stride(1) == 1 and d.stride(1) == 1
    windows = not (linear and rows_in_line and contiguous and len(weight.inputs) == 1 and a.dtype == d.dtype)
    kind, unit, maps = _kind(weight), 1 if windows else _unit(a, d), weight.maps is not None
    if weight.depthwise:
        kind = kind if kind == FLOAT64 else IEEE
        kernel, tile = moments_of_depthwise, depthwise_tile(architecture, kind, weight.width)
    else:
        kernel = moments_of_windows if windows else moments_of_tiles
        tile = tile_for(architecture, kind, windows=windows, unit=unit, signed=weight.signed, maps=maps)
    return _Form(kernel, tile, a.dtype, d.dtype, kind, unit, maps, weight.signed)


def _unit(a: Tensor, d: Tensor) -> int:
    """Returns how many elements every pointer, width and stride is a multiple of: 16 bytes, 8, or one element."""
    size = a.element_size()
    numbers = [n for t in (a, d) for n in (t.shape[1], t.stride(0), t.stride(3))]
    for unit in (8, 4) if size == 2 else (4,):
        if all(n % unit == 0 for n in numbers) and all(t.data_ptr() % (unit * size) == 0 for t in (a, d)):
            return unit
    return 1


def _plans(weights: Sequence[Weight], architecture: int) -> list[_Plan]:
    plans: dict[_Form, _Plan] = {}
    for slot, weight in enumerate(weights):
        form = _form(weight, architecture)
        plans.setdefault(form, _Plan(form)).slots.append(slot)
    # Tiles that take long come first, so that the last ones to end are short.
    for plan in plans.values():
        plan.slots.sort(key=lambda slot: -_steps(weights[slot], plan.form.tile))
    return list(plans.values())


def _steps(weight: Weight, tile: Tile) -> int:
    chunks = sum(-(-d.shape[2] * d.shape[3] // tile.chunk) for d in weight.output_grads)
    return len(weight.inputs[0]) * chunks


def _table(
    weights: Sequence[Weight], plans: Sequence[_Plan], every_element: bool
) -> tuple[Tensor, list[tuple[int, int]], list[bool]]:
    """Returns the table, where its sections begin and end, and of which weights every element is looked at."""
    problems, uses, ends, operands, zeros = (array("q") for _ in range(5))
    zeros.extend([0] * len(weights))
    seen = [True] * len(weights)
    tiles = first_use = 0
    for plan in plans:
        for slot in plan.slots:
            weight = weights[slot]
            count = _tiles_in_plane(weight, plan.form.tile) * weight.planes
            problems.extend(_problem(weight, plan, slot, first_use, tiles, count))
            uses.extend(_uses(weight, plan.form))
            first_use += len(weight.inputs)
            tiles += count
            ends.append(tiles)
        plan.end_tile = tiles
    for slot, side, tensor in _operands(weights):
        every = 1 if every_element else max(1, tensor.numel() // SAMPLED_ELEMENTS)
        seen[slot] = seen[slot] and every == 1
        operands.extend(_operand(tensor, every, 2 * slot + side))
    pieces, numbers = [], array("q")
    for section in (problems, uses, ends, operands, zeros):
        # Sections begin at multiples of 16 bytes: another alignment would be another compiled kernel.
        begin = len(numbers)
        pieces.append((begin, begin + len(section)))
        numbers += section
        numbers.extend([0] * (-len(section) % 2))
    return torch.frombuffer(numbers, dtype=torch.int64), pieces, seen


def _tiles_in_plane(weight: Weight, tile: Tile) -> int:
    return -(-weight.height // tile.rows) * -(-weight.width // tile.columns)


def _loop(weight: Weight) -> tuple[int, int, int]:
    """Returns samples a group, rows a sample and samples as the kernel takes them.

    The samples of a group are one long sample where their rows follow one another at the same distance: a chunk of
    rows is then filled across samples.
    """
    a, d = weight.inputs[0], weight.output_grads[0]
    rows, in_group = d.shape[2] * d.shape[3], len(a) // weight.groups
    joined = all(t.stride(0) == rows * t.stride(3) for t in (a, d))
    return (1, rows * in_group, in_group) if joined and in_group * rows < _LIMIT // 256 else (in_group, rows, 1)


def _problem(weight: Weight, plan: _Plan, slot: int, first_use: int, first_tile: int, tiles: int) -> list[int]:
    unit = plan.form.unit
    group_size = len(weight.inputs[0]) // weight.groups
    in_group = _loop(weight)[0] if plan.form.kernel is moments_of_tiles else group_size
    return [
        weight.height // unit,
        weight.width // unit,
        weight.groups,
        in_group,
        first_use,
        len(weight.inputs),
        first_tile,
        slot,
        tiles,
        0 if weight.maps is None else weight.maps.data_ptr(),
        int(weight.signed),
        group_size,
        weight.dilation[1],
        weight.height,
        weight.width,
        _tiles_in_plane(weight, plan.form.tile),
        *weight.kernel,
        *weight.stride,
        *weight.padding,
        weight.dilation[0],
        weight.height // weight.channel_groups,
    ]


def _uses(weight: Weight, form: _Form) -> list[int]:
    numbers: list[int] = []
    for a, d in zip(weight.inputs, weight.output_grads, strict=True):
        rows, joined = d.shape[2] * d.shape[3], 1
        lines = form.kernel is moments_of_tiles
        if lines:
            _, rows, joined = _loop(weight)
        for tensor in (a, d):
            sample, channel, y, x = tensor.stride()
            pointer = tensor.data_ptr() // (form.unit * tensor.element_size() if lines else 1)
            numbers += [pointer, sample * joined // form.unit, x // form.unit, y, channel, *tensor.shape[2:]]
        numbers += [rows, min(form.tile.chunk, power_of_two(d.shape[3]))]
    return numbers


def _operands(weights: Sequence[Weight]) -> list[tuple[int, int, Tensor]]:
    """Returns every operand with its weight's number and its side, those of one type together."""
    by_type: dict[torch.dtype, list[tuple[int, int, Tensor]]] = {dtype: [] for dtype in _TYPES}
    for slot, weight in enumerate(weights):
        for side, tensors in enumerate((weight.inputs, weight.output_grads)):
            for tensor in tensors:
                by_type[tensor.dtype].append((slot, side, tensor))
    return [operand for operands in by_type.values() for operand in operands]


def _operand(tensor: Tensor, every: int, magnitude: int) -> list[int]:
    # Neighbours in memory are neighbours in the last dimension; a broadcast dimension is looked at once.
    sizes = [(n if s else 1, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    sizes.sort(key=lambda pair: (pair[0] > 1, -pair[1]))
    return [tensor.data_ptr(), *(n for n, _ in sizes), *(s for _, s in sizes), every, magnitude, *[0] * 5]


def _find_magnitudes(weights: Sequence[Weight], operands: Tensor, magnitudes: Tensor) -> None:
    counts = Counter(t.dtype for w in weights for t in (*w.inputs, *w.output_grads))
    interpreted = not operands.is_cuda
    begin = 0
    for dtype, source in _TYPES.items():
        count = counts[dtype]
        if not count:
            continue
        fields = OPERAND_FIELDS.value
        largest_magnitudes[(count, 1 if interpreted else MAGNITUDE_PROGRAMS)](
            operands[begin * fields :],
            magnitudes,
            SOURCE=source,
            **MAGNITUDE_BLOCK,
            num_warps=4,
        )
        begin += count


def _work_through(
    plans: Sequence[_Plan], memory: tuple[Tensor, ...], signed_partials: Tensor | None, device: torch.device
) -> None:
    problem_count = sum(len(plan.slots) for plan in plans)
    first_tile = 0
    for plan in plans:
        form, tile = plan.form, plan.form.tile
        source = _TYPES[form.a_type]
        options: dict[str, Any] = constants_of(
            tile, form.kind, source, maps=form.maps, signed=form.signed, interpreted=device.type == "cpu"
        )
        if form.kernel is moments_of_tiles:
            options |= {"SOURCE": source, "UNIT": form.unit}
        else:
            options |= {"A_SOURCE": source, "D_SOURCE": _TYPES[form.d_type]}
        if form.kernel is moments_of_depthwise:
            options = without_product(options)
        form.kernel[(_programs(device, tile, plan.end_tile - first_tile),)](
            *memory,
            signed_partials if form.signed else None,
            problem_count,
            first_tile,
            plan.end_tile,
            **options,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        first_tile = plan.end_tile


def time_tiles(weights: Sequence[Weight], tiles: Sequence[Tile]) -> dict[Tile, float]:
    """Returns the median milliseconds of a launch with each tile, for weights that all take the same kernel.

    For choosing the tables of gradient_moments_tiles.py on a new device; nothing calls it while scoring.
    """
    from triton.testing import do_bench

    times = {}
    for tile in tiles:
        plans = _plans(weights, _architecture(weights[0].inputs[0].device))
        if len(plans) > 1:
            raise InputError(f"expected weights that take one kernel, got {[plan.form for plan in plans]}")
        plans[0].form = replace(plans[0].form, tile=tile)
        times[tile] = do_bench(partial(_start, weights, plans, every_element=False), return_mode="median")
    return times
