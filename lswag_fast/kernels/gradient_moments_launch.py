"""Puts weights into the tables of the gradient-moments kernels, and launches them.

A launch makes one table on the host, sends it by kernel arguments, and starts three to a handful of kernels; nothing is
read back before `finish`, and nothing reads the host's memory later, so that a CUDA graph can capture it once kernels
have been loaded by a launch before. Programs hold their tiles in registers: beyond operands there are the table (about
0.5 KB a weight) and 40 bytes a tile, 104 where signed moments are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..errors import InputError
from .gradient_moments import moments_of_tiles
from .gradient_moments_depthwise import moments_of_depthwise
from .gradient_moments_layout import TYPES, WGMMA, Form, Layout, Rows, sums_of
from .gradient_moments_shared import (
    EVERY,
    FIRST_TILE,
    FIRST_USE,
    MAGNITUDE,
    MAPS_AT,
    OPERAND_FIELDS,
    RESULTS,
    SIGNED_SUMS,
    SLOT,
    SOURCE_AT,
    SUMS,
    WEIGHT_FIELDS,
    A,
    D,
    largest_magnitudes,
    sums_of_tiles,
)
from .gradient_moments_tiles import TILES, Tile
from .gradient_moments_variants import MAGNITUDE_BLOCK, SUMS_BLOCK, constants_of, without_product
from .launch import Launch

SAMPLED_ELEMENTS = 1 << 16
"""Of an operand, for its scale: 0.1 to 2 % of what the moments read."""
MAGNITUDE_PROGRAMS = 8


@dataclass(frozen=True)
class Placed:
    """A weight where it lies: its layout, and its operands, inputs and output gradients in turn."""

    layout: Layout
    operands: Sequence[Tensor]
    maps: Tensor | None = None
    """Where the maps go, float64 [2 or (signed) 5, numel] in the order of MomentMaps, contiguous; or None."""
    values: Tensor | None = None
    """The weight itself as a matrix, planes one below the other, of the type that its layout knows; or None."""


@dataclass(frozen=True)
class Launched:
    """What runs on the device, and the memory it reads: `results` are float64 [weights, 8 or (signed) 16]."""

    results: Tensor
    everything_seen: Sequence[bool]
    held: Sequence[object]


@dataclass(frozen=True)
class _Section:
    """The tiles of one form, which one kernel works through; numbers are those of rows of sums."""

    form: Form
    first_tile: int
    end_tile: int


@dataclass(frozen=True)
class _Tables:
    sections: Sequence[_Section]
    problems: Rows
    uses: Rows
    ends: Rows
    operands: Rows
    values: Rows
    """The weights themselves, a row a slot; none where no problem has one."""
    types: Sequence[int]
    """How many operands are of each of TYPES; they follow in that order."""
    everything_seen: Sequence[bool]

    def joined(self) -> tuple[Tensor, list[tuple[int, int]]]:
        """Returns problems, uses, ends, operands, weights and zeros for magnitudes in one tensor, and where each lies.

        Sections begin at multiples of 16 bytes: another alignment would be another compiled kernel.
        """
        parts = (self.problems, self.uses, self.ends, self.operands, self.values)
        sizes = [part.size for part in parts] + [len(self.problems)]
        begins = np.cumsum([0] + [size + size % 2 for size in sizes]).tolist()
        table = np.zeros(begins[-1], dtype=np.int64)
        for part, begin in zip(parts, begins, strict=False):
            table[begin : begin + part.size] = part.reshape(-1)
        return torch.from_numpy(table), [(b, b + n) for b, n in zip(begins, sizes, strict=False)]


def launch(weights: Sequence[Placed], *, every_element: bool = False) -> Launched:
    """Starts the kernels on the current stream of the weights' device, without waiting for them.

    `every_element` looks at all elements for the scales, rather than at lines of SAMPLED_ELEMENTS.
    """
    device = weights[0].operands[0].device
    tables = _tables(weights, every_element)
    table, pieces = tables.joined()
    tiles = tables.sections[-1].end_tile
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        on_device = _on_device(table, device)
        problems, uses, ends, operands, values, slots = (on_device[begin:end] for begin, end in pieces)
        magnitudes = slots.view(torch.int32)
        partials = torch.empty(tiles * SUMS.value, dtype=torch.float64, device=device)
        signed = _any_signed(weights)
        signed_partials = torch.empty(tiles * SIGNED_SUMS.value, dtype=torch.float64, device=device) if signed else None
        results = torch.empty(len(weights), _results(signed), dtype=torch.float64, device=device)
        _find_magnitudes(tables.types, operands, magnitudes)
        memory = (problems, uses, ends, magnitudes, partials)
        for section in tables.sections:
            _work_through(section, memory, signed_partials, values, len(weights))
        _sums(signed, device).start((len(weights), 1), (problems, magnitudes, partials, signed_partials, results))
    return Launched(results, tables.everything_seen, (weights, on_device, partials, signed_partials))


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table
    on_device = torch.empty_like(table, device=device)
    _C.cuda_write_numbers(table, on_device, torch.cuda.current_stream(device).cuda_stream)
    return on_device


def workspace_bytes(weights: Sequence[Placed]) -> int:
    """Returns the device memory that a launch takes beside operands and maps."""
    tables = _tables(weights, every_element=False)
    signed = _any_signed(weights)
    numbers = tables.sections[-1].end_tile * sums_of(signed) + len(weights) * _results(signed)
    return (tables.joined()[0].numel() + numbers) * 8


def _any_signed(weights: Sequence[Placed]) -> bool:
    return any(weight.layout.form.signed for weight in weights)


def _results(signed: bool) -> int:
    return int(RESULTS.value + signed * SIGNED_SUMS.value)


def architecture_of(device: torch.device) -> int:
    """Returns the compute capability of a device times ten; 0 for the CPU, where kernels are interpreted.

    Raises InputError for one below 8.0.
    """
    architecture = _device_facts(device)[0] if device.type == "cuda" else 0
    if 0 < architecture < min(TILES):
        raise InputError(
            f"expected tensors on a device of compute capability 8.0 or newer, got {architecture / 10} ({device}); "
            f"move them with .cpu()"
        )
    return architecture


@cache
def has_wgmma(device: torch.device) -> bool:
    """Tells whether the CUDA C++ kernel runs on a device: a Hopper GPU, and a build that holds code for it."""
    if device.type != "cuda":
        return False
    return _C.cuda_has_grouped_moments(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _programs(device: torch.device, tile: Tile, tiles: int) -> int:
    return min(tiles, _device_facts(device)[1] * tile.residents if device.type == "cuda" else 3)


def _tables(weights: Sequence[Placed], every_element: bool) -> _Tables:
    layouts = [weight.layout for weight in weights]
    slots_of: dict[Form, list[int]] = {}
    for slot, layout in enumerate(layouts):
        slots_of.setdefault(layout.form, []).append(slot)
    # Tiles that take long come first, so that the last ones to end are short.
    for slots in slots_of.values():
        slots.sort(key=lambda slot: -layouts[slot].steps)
    order = [slot for slots in slots_of.values() for slot in slots]

    problems = np.concatenate([layouts[slot].problem for slot in order])
    ends = np.cumsum([layouts[slot].tiles for slot in order])
    uses_of = [len(layouts[slot].uses) for slot in order]
    problems[:, FIRST_USE.value] = np.cumsum(uses_of) - uses_of
    problems[1:, FIRST_TILE.value] = ends[:-1]
    problems[:, SLOT.value] = order
    problems[:, MAPS_AT.value] = [0 if (maps := weights[slot].maps) is None else maps.data_ptr() for slot in order]

    uses = np.concatenate([layouts[slot].uses for slot in order])
    addresses = [[tensor.data_ptr() for tensor in weight.operands] for weight in weights]
    in_order = np.array([address for slot in order for address in addresses[slot]], dtype=np.int64)
    uses[:, [A.value, D.value]] = in_order.reshape(-1, 2) // uses[:, [A.value, D.value]]

    numbers = np.cumsum([len(slots) for slots in slots_of.values()])
    last = [0, *(ends[number - 1] for number in numbers.tolist())]
    sections = [_Section(form, int(last[n]), int(last[n + 1])) for n, form in enumerate(slots_of)]
    operands, types, seen = _operands(layouts, addresses, every_element)
    return _Tables(sections, problems, uses, ends, operands, _values(weights), types, seen)


def _values(weights: Sequence[Placed]) -> Rows:
    """Returns address and strides of every weight, 0 where it is not given."""
    if all(weight.values is None for weight in weights):
        return np.zeros((0, WEIGHT_FIELDS.value), dtype=np.int64)
    rows = [(0, 0, 0) if (w := weight.values) is None else (w.data_ptr(), *w.stride()) for weight in weights]
    return np.array(rows, dtype=np.int64)


def _operands(
    layouts: Sequence[Layout], addresses: Sequence[Sequence[int]], every_element: bool
) -> tuple[Rows, list[int], list[bool]]:
    """Returns the rows of all operands, those of one type together, the count of each type, and what is seen whole."""
    slots = np.repeat(np.arange(len(layouts)), [len(layout.types) for layout in layouts])
    rows = np.concatenate([layout.operands for layout in layouts])
    rows[:, SOURCE_AT.value] = [address for of_weight in addresses for address in of_weight]
    rows[:, MAGNITUDE.value] += 2 * slots
    every = 1 if every_element else np.maximum(1, rows[:, EVERY.value] // SAMPLED_ELEMENTS)
    rows[:, EVERY.value] = every
    sampled = set(slots[rows[:, EVERY.value] > 1].tolist())
    types = np.array([kind for layout in layouts for kind in layout.types])
    counts = np.bincount(types, minlength=len(TYPES)).tolist()
    return rows[np.argsort(types, kind="stable")], counts, [slot not in sampled for slot in range(len(layouts))]


def _find_magnitudes(types: Sequence[int], operands: Tensor, magnitudes: Tensor) -> None:
    begin, programs = 0, MAGNITUDE_PROGRAMS if operands.is_cuda else 1
    for source, count in zip(TYPES, types, strict=True):
        if count:
            of_type = operands[begin * OPERAND_FIELDS.value :]
            _magnitudes(source, operands.device).start((count, programs), (of_type, magnitudes))
        begin += count


def _work_through(
    section: _Section, memory: tuple[Tensor, ...], signed_partials: Tensor | None, values: Tensor, problem_count: int
) -> None:
    form, device = section.form, memory[0].device
    if form.kernel is WGMMA:
        problems, uses, ends, magnitudes, partials = memory
        half = form.a_type == torch.float16
        tables = (problems, uses, ends, magnitudes.view(torch.int64), partials)
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.cuda_grouped_moments(*tables, problem_count, section.first_tile, section.end_tile, half, stream)
        return
    tensors = (*memory, signed_partials if form.signed else None, None if form.value_type is None else values)
    programs = _programs(device, form.tile, section.end_tile - section.first_tile)
    numbers = (problem_count, section.first_tile, section.end_tile)
    _moments(form, device).start((programs, 1), tensors, numbers)


@cache
def _magnitudes(source: torch.dtype, device: torch.device) -> Launch:
    return Launch(largest_magnitudes, device, {"SOURCE": TYPES[source], **MAGNITUDE_BLOCK, "num_warps": 4})


@cache
def _sums(signed: bool, device: torch.device) -> Launch:
    return Launch(sums_of_tiles, device, {"BLOCK": SUMS_BLOCK, "SIGNED": signed, "num_warps": 4})


@cache
def _moments(form: Form, device: torch.device) -> Launch:
    tile, source = form.tile, TYPES[form.a_type]
    options: dict[str, Any] = constants_of(
        tile,
        form.kind,
        source,
        maps=form.maps,
        signed=form.signed,
        weight=None if form.value_type is None else TYPES[form.value_type],
        interpreted=device.type == "cpu",
    )
    if form.kernel is moments_of_tiles:
        options |= {"SOURCE": source, "UNIT": form.unit}
    else:
        options |= {"A_SOURCE": source, "D_SOURCE": TYPES[form.d_type]}
    if form.kernel is moments_of_depthwise:
        options = without_product(options)
    return Launch(form.kernel, device, {**options, "num_warps": tile.warps, "num_stages": tile.stages})
