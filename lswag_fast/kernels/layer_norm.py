"""LayerNorm of rows, after the addition of a residual where there is one; forward and backward.

Memory bound: forward reads a row and writes it normalised (with a residual: reads two, writes two), backward reads the
gradient and the row and writes one (with a residual: one more read). 12,608 rows of 240 (AutoFormer-Tiny, S = 64) in
16 bits are 6.05 MB: at 4.3 TB/s a floor of 2.8 us for each forward or 4.2 for each backward pass, 5.6 with a residual;
unfused, the addition alone reads and writes three times that row, another 4.2. Arithmetic, some 10 operations an
element, is a tenth of that.

A program has a tile of whole rows in registers, 1024 elements on 4 warps, padded to a power of two in registers only.
Statistics and sums are float32, two-pass: the row is there, so the squares are of differences from the mean.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import Empty, empty_like
from .arithmetic import narrow
from .launch import MOST_LAUNCHES, Launch, power_of_two
from .variant import Variant

MOST_COLUMNS = 8192
TILE = 1024
PARTS = 512


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    normalised,
    statistics,
    eps,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Writes `normalised` [rows, columns], `statistics` [2, rows] (mean, 1/deviation); with RESIDUAL `total` too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = row[:, None] * columns + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    if RESIDUAL:
        added = tl.load(residual + place, mask=inside, other=0.0)
        value = narrow(value.to(tl.float32) + added.to(tl.float32), x.dtype.element_ty)
        tl.store(total + place, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.sum(value, 1) / columns
    centred = tl.where(inside, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / columns + eps)
    result = centred * scale[:, None]
    if WEIGHT:
        result *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(normalised + place, narrow(result, x.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean, mask=row < rows)
    tl.store(statistics + rows + row, scale, mask=row < rows)


@triton.jit
def backward_kernel(
    total,
    weight,
    statistics,
    grad_total,
    grad_normalised,
    grad_x,
    grad_parameters,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    PARAMETERS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes `grad_x` [rows, columns], the gradient of what was normalised, plus `grad_total` with RESIDUAL.

    Each program has TILES tiles one after the other. With PARAMETERS it writes its parts of the weight's and the
    bias's gradients, `grad_parameters` [programs, 2, columns].
    """
    column = tl.arange(0, COLUMNS)
    if WEIGHT:
        factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([COLUMNS], tl.float32)
    d_bias = tl.zeros([COLUMNS], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = row[:, None] * columns + column[None, :]
        value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad_normalised + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        value = tl.where(inside, (value - mean[:, None]) * scale[:, None], 0.0)
        if PARAMETERS:
            d_weight += tl.sum(gradient * value, 0)
            d_bias += tl.sum(gradient, 0)
        if WEIGHT:
            gradient *= factor
        along = tl.sum(gradient * value, 1) / columns
        level = tl.sum(gradient, 1) / columns
        result = (gradient - level[:, None] - value * along[:, None]) * scale[:, None]
        if RESIDUAL:
            result += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, narrow(result, grad_x.dtype.element_ty), mask=inside)
    if PARAMETERS:
        part = grad_parameters + tl.program_id(0).to(tl.int64) * (2 * columns) + column
        tl.store(part, d_weight, mask=column < columns)
        tl.store(part + columns, d_bias, mask=column < columns)


def _tile(columns: int) -> dict[str, int]:
    width = power_of_two(columns)
    return {"ROWS": max(1, TILE // width), "COLUMNS": width, "num_warps": 4 if width <= 2048 else 8}


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    empty: Empty = torch.empty,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x + residual (x itself without one), that normalised, and its statistics [2, rows], float32.

    `x` [..., columns] and `residual` are of one dtype, as are `weight` and `bias` [columns].
    """
    x = x.contiguous()
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    columns = x.shape[-1]
    rows = x.numel() // columns
    normalised = empty_like(x, empty)
    total = x if residual is None else empty_like(x, empty)
    statistics = empty((2, rows), dtype=torch.float32, device=x.device)
    if rows:
        given = (residual is not None, weight is not None, bias is not None)
        launch = _forward_launch(rows, columns, eps, given, x.dtype, x.device)
        launch(x, residual, weight, bias, total, normalised, statistics)
    return total, normalised, statistics


@lru_cache(MOST_LAUNCHES)
def _forward_launch(
    rows: int, columns: int, eps: float, given: tuple[bool, bool, bool], _dtype: torch.dtype, device: torch.device
) -> Launch:
    tile = _tile(columns)
    arguments = {"eps": eps, "rows": rows, "columns": columns, **tile}
    arguments |= dict(zip(("RESIDUAL", "WEIGHT", "BIAS"), given, strict=True))
    return Launch(forward_kernel, device, arguments, triton.cdiv(rows, tile["ROWS"]))


def backward(
    total: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    grad_total: Tensor | None,
    grad_normalised: Tensor,
    with_parameters: bool,
    empty: Empty = torch.empty,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of `total`, and where asked for the weight's and the bias's, [2, columns] float32.

    Arguments as `forward` returned them, and the gradients of its results.
    """
    total, grad_normalised = total.contiguous(), grad_normalised.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    columns = total.shape[-1]
    rows = total.numel() // columns
    grad_x = empty_like(total, empty)
    given = (grad_total is not None, weight is not None, with_parameters)
    launch, programs = _backward_launch(rows, columns, given, total.dtype, total.device)
    parts = None
    if with_parameters:
        parts = torch.empty(programs, 2, columns, dtype=torch.float32, device=total.device)
    if programs:
        launch(total, weight, statistics, grad_total, grad_normalised, grad_x, parts)
    return grad_x, None if parts is None else parts.sum(0)


@lru_cache(MOST_LAUNCHES)
def _backward_launch(
    rows: int, columns: int, given: tuple[bool, bool, bool], _dtype: torch.dtype, device: torch.device
) -> tuple[Launch, int]:
    """Returns the launch and its programs."""
    tile = _tile(columns)
    count = triton.cdiv(rows, tile["ROWS"])
    # Powers of two: few different kernels.
    tiles = power_of_two(triton.cdiv(count, PARTS)) if given[2] and rows else 1
    programs = triton.cdiv(count, tiles)
    arguments = {"rows": rows, "columns": columns, "TILES": tiles, **tile}
    arguments |= dict(zip(("RESIDUAL", "WEIGHT", "PARAMETERS"), given, strict=True))
    return Launch(backward_kernel, device, arguments, programs), programs


def variants() -> Iterator[Variant]:
    """The launches for AutoFormer's widths, of an addition and alone, without and with parameter gradients."""
    for name in ("bf16", "fp16", "fp32"):
        for columns in (240, 624) if name == "bf16" else (240,):
            tile = _tile(columns)
            warps = tile.pop("num_warps")
            types = {
                **dict.fromkeys(
                    ("x", "residual", "weight", "bias", "total", "normalised", "grad_normalised", "grad_x"),
                    f"*{name}:16",
                ),
                "grad_total": f"*{name}:16",
                "statistics": "*fp32:16",
                "grad_parameters": "*fp32:16",
                "eps": "fp32",
                "rows": "i32:16",
                "columns": "i32:16",
            }
            yield Variant(
                name=f"layer_norm forward {name} {columns}, with a residual",
                kernel=forward_kernel,
                types=_of(forward_kernel, types),
                constants={**tile, "RESIDUAL": True, "WEIGHT": True, "BIAS": True},
                warps=warps,
                stages=1,
            )
            for with_parameters in (False, True):
                yield Variant(
                    name=f"layer_norm backward {name} {columns}" + ", with parameters" * with_parameters,
                    kernel=backward_kernel,
                    types=_of(backward_kernel, types),
                    constants={
                        **tile,
                        "RESIDUAL": True,
                        "WEIGHT": True,
                        "PARAMETERS": with_parameters,
                        "TILES": 8 if with_parameters else 1,
                    },
                    warps=warps,
                    stages=1,
                )


def _of(kernel: triton.JITFunction, types: dict[str, str]) -> dict[str, str]:
    return {name: types[name] for name in kernel.arg_names if name in types}
