"""Attention with AutoFormer's 2-D relative positions, forward pass.

One program has BM queries of one (sample, head), and goes over blocks of BN keys with a running softmax. What the
tables add to the scores is had from q @ tables^T [BM, 2*SLOTS], moved to places of keys once a program, and spread
over each block's keys by a product with a 0/1 matrix; in 16 bits that tile is split in two, so that scores keep
16 bits or more of it. What the tables add to the output is had the other way: the same 0/1 matrix sums the
probabilities by the place of their key, and the sums are moved to table rows and multiplied by the tables once.
qkv is read where the projection wrote it.

AutoFormer-Tiny (T = 197, D = 64, 30 table rows), a (sample, head): 4*T*T*D = 9.9 MFLOP for attention itself,
8*30*T*D = 3.0 for the tables, 2*T*T*(64 + 32) = 7.5 for the 0/1 products; with T padded to 256, 33. 101 kB in 16 bits
are moved. At 788 TFLOP/s and 4.3 TB/s that is 0.042 and 0.023 us: S = 64 with 4 heads has a floor of 11 us a layer
(6 by bytes). Gathers over whole tiles of scores would need no 0/1 products, but two reads of shared memory a score and
two changes of layout: more than these products cost on tensor cores.

64 queries on 4 warps, the least for wgmma, by 32 keys: 197 keys are 6.2 blocks (12 % of 224 wasted, of 64 it would be
23 % of 256), three stages of them fit beside each other, and 154 to 168 registers let three programs share a processor.
128 queries would halve the programs (S * heads * blocks), of which one candidate at S = 8 has few. float32 is
multiplied without tensor cores, in 32 x 32 tiles: each thread holds its rows of both operands in registers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import Empty
from .arithmetic import multiply, narrow
from .launch import MOST_LAUNCHES, Launch, power_of_two
from .relative_places import by_place, by_slot, indicator, load_tables, load_tokens
from .variant import Variant

HEAD_DIM = 64
MOST_PLACES = 32
MOST_SLOTS = 32
LOG2_E = 1.4426950408889634


@triton.jit
def forward_kernel(
    qkv,
    key_vertical,
    key_horizontal,
    value_vertical,
    value_horizontal,
    indicator,
    out,
    softmax,
    factor,
    heads,
    sample_stride,
    token_stride,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    PLACES: tl.constexpr,
    SLOTS: tl.constexpr,
    CLIPPED: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Writes `out` [S, T, H*D], and of each query log2 of the sum of its exponentials, `softmax` [S, H, T].

    `factor` is the scale of the scores times log2(e).
    """
    dtype: tl.constexpr = qkv.dtype.element_ty
    blocks: tl.constexpr = (T + BM - 1) // BM
    unit = tl.program_id(0) // blocks
    sample, head = (unit // heads).to(tl.int64), unit % heads
    query = tl.program_id(0) % blocks * BM + tl.arange(0, BM)

    base = qkv + sample * sample_stride + head * D
    q = load_tokens(base, query, token_stride, T, D)
    key_tables = load_tables(key_vertical, key_horizontal, REACH, SLOTS, D)
    of_slots = multiply(q, tl.trans(key_tables), tl.zeros([BM, 2 * SLOTS], tl.float32))
    bias = by_place(of_slots, query, COLUMNS, REACH, PLACES, SLOTS)
    bias_high = narrow(bias, dtype)
    bias_low = narrow(bias - bias_high.to(tl.float32), dtype)

    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, D], tl.float32)
    sums = tl.zeros([BM, 2 * PLACES], tl.float32)
    for first in tl.range(0, T, BN):
        key = first + tl.arange(0, BN)
        k = load_tokens(base + heads * D, key, token_stride, T, D)
        v = load_tokens(base + 2 * heads * D, key, token_stride, T, D)
        places = tl.trans(load_tokens(indicator, key, 2 * PLACES, T, 2 * PLACES))
        scores = multiply(bias_high, places, tl.zeros([BM, BN], tl.float32))
        if dtype != tl.float32:
            scores = multiply(bias_low, places, scores)
        scores = multiply(q, tl.trans(k), scores)
        scores = tl.where(key[None, :] < T, scores * factor, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - raised)
        p = tl.exp2(scores - raised[:, None])
        total = total * shrink + tl.sum(p, 1)
        p = narrow(p, dtype)
        result = multiply(p, v, result * shrink[:, None])
        sums = multiply(p, tl.trans(places), sums * shrink[:, None])
        largest = raised

    # `total` is above 0, which the compiler cannot know: else it keeps the places of every query over the whole loop.
    again = query + (total < 0).to(tl.int32)
    result = result / total[:, None]
    of_slots = by_slot(sums / total[:, None], again, COLUMNS, REACH, PLACES, SLOTS, CLIPPED)
    value_tables = load_tables(value_vertical, value_horizontal, REACH, SLOTS, D)
    result = multiply(narrow(of_slots, dtype), value_tables, result)
    rows = out + (sample * T * heads + head) * D + query[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    tl.store(rows, narrow(result, dtype), mask=query[:, None] < T)
    tl.store(softmax + unit.to(tl.int64) * T + query, largest + tl.log2(total), mask=query < T)


def fits(qkv: Tensor, tables: list[Tensor], heads: int, grid: tuple[int, int]) -> bool:
    """Returns whether the kernels take these shapes: D = 64, up to 31 x 31 patches, L from 1 to 15, offsets in 31 bits.

    Larger tiles of places or table rows would not fit the registers beside those of scores.
    """
    reach = tables[0].shape[0] // 2 - 1
    same = all(table.shape[0] == tables[0].shape[0] for table in tables)
    small = max(grid) < MOST_PLACES and 1 <= reach < MOST_SLOTS // 2
    return same and small and qkv.shape[2] == 3 * heads * HEAD_DIM and qkv.shape[1] * qkv.shape[2] < 2**31


def shape_constants(grid: tuple[int, int], table_rows: int) -> dict[str, Any]:
    """Returns the constants of the kernels that follow from the grid of patches and the rows of a table."""
    reach = table_rows // 2 - 1
    return {
        "T": 1 + grid[0] * grid[1],
        "COLUMNS": grid[1],
        "REACH": reach,
        "PLACES": power_of_two(max(grid) + 1, least=16),
        "SLOTS": power_of_two(table_rows, least=16),
        "CLIPPED": reach < max(grid) - 1,
        "D": HEAD_DIM,
    }


def blocks(dtype: torch.dtype, places: int) -> dict[str, int]:
    """Returns the tile of the forward pass, and its warps and stages."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    return {"BM": 64 if places == 16 else 32, "BN": 32, "num_warps": 4, "num_stages": 3}


def rows_apart(qkv: Tensor) -> Tensor:
    """Returns `qkv` where its last axis is contiguous and its rows less than 2^31 elements long; else a copy."""
    tokens = qkv.shape[1]
    readable = qkv.stride(2) == 1 and 0 <= qkv.stride(1) < 2**31 // tokens and qkv.stride(0) >= 0
    return qkv if readable else qkv.contiguous()


def forward(
    qkv: Tensor,
    tables: list[Tensor],
    heads: int,
    grid: tuple[int, int],
    scale: float,
    empty: Empty = torch.empty,
) -> tuple[Tensor, Tensor]:
    """Returns the output [S, T, H*D], and log2 of each query's sum of exponentials, [S, H, T] float32.

    `qkv` is as `rows_apart` returns it; `tables` (key vertical, key horizontal, value vertical, value horizontal) are
    contiguous, of its dtype.
    """
    samples, tokens, _ = qkv.shape
    out = empty((samples, tokens, heads * HEAD_DIM), dtype=qkv.dtype, device=qkv.device)
    softmax = empty((samples, heads, tokens), dtype=torch.float32, device=qkv.device)
    if samples:
        given = (samples, heads, grid, tables[0].shape[0], scale, qkv.stride(0), qkv.stride(1))
        launch, places = _launch(*given, qkv.dtype, qkv.device)
        launch(qkv, *tables, indicator(grid, places, qkv.dtype, qkv.device), out, softmax)
    return out, softmax


@lru_cache(MOST_LAUNCHES)
def _launch(
    samples: int,
    heads: int,
    grid: tuple[int, int],
    table_rows: int,
    scale: float,
    sample_stride: int,
    token_stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, int]:
    """Returns the launch and the places of its indicator."""
    constants = shape_constants(grid, table_rows)
    chosen = blocks(dtype, constants["PLACES"])
    numbers = {
        "factor": scale * LOG2_E,
        "heads": heads,
        "sample_stride": sample_stride,
        "token_stride": token_stride,
    }
    programs = samples * heads * triton.cdiv(constants["T"], chosen["BM"])
    return Launch(forward_kernel, device, {**numbers, **constants, **chosen}, programs), constants["PLACES"]


def variants() -> Iterator[Variant]:
    """The launches for AutoFormer at 224 x 224, and one with clipped distances on a larger grid."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for grid in ((14, 14), (20, 20)) if dtype != torch.float16 else ((14, 14),):
            constants = shape_constants(grid, 30)
            chosen = blocks(dtype, constants["PLACES"])
            pointers = forward_kernel.arg_names[:7]
            yield Variant(
                name=f"relative_attention forward {name} {grid[0]}x{grid[1]}",
                kernel=forward_kernel,
                types={
                    **dict.fromkeys(pointers, f"*{name}:16"),
                    "softmax": "*fp32:16",
                    "factor": "fp32",
                    "heads": "i32",
                    "sample_stride": "i32:16",
                    "token_stride": "i32:16",
                },
                constants={**constants, "BM": chosen["BM"], "BN": chosen["BN"]},
                warps=chosen["num_warps"],
                stages=chosen["num_stages"],
                matrix=dtype != torch.float32,
                pipelined=dtype != torch.float32,
            )
