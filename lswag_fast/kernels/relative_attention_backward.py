"""Attention with AutoFormer's 2-D relative positions, backward pass: two launches, no atomics.

Both work out the probabilities again from the saved log2 of each query's sum of exponentials. The first has BM queries
a program and gives dQ; with `TABLES` also the program's part of the gradients of the tables, which are added up in a
fixed order afterwards. It leaves what the tables add to its queries' scores and to the gradients of its probabilities,
by place of the key, and delta = sum_d dO_d O_d. The second has BN keys a program, reads those, and gives dK and dV.

AutoFormer-Tiny (T = 197, D = 64, 30 table rows), a (sample, head): seven products of T*T*64 (34.8 MFLOP), 0/1
products of T*T*(32 * 6) (14.9), the tables' 6; padded to 224 x 256 tokens, 74. 101 kB of qkv and output, as much of
gradients, and 38 to 76 kB of places written and read are moved. At 788 TFLOP/s and 4.3 TB/s: 0.094 and 0.07 us; S = 64
with 4 heads has a floor of 24 us a layer. One launch that keeps all of it would do five products instead of seven, but
have S * heads programs instead of four times as many, and add dQ up in memory.

The tiles are the largest without spills beside what the tables need: 64 queries for wgmma (four warps of 16 rows), and
half of that where places take 32 columns instead of 16, beyond 15 x 15 patches.

The probabilities are rounded to the operands' dtype before a product, as are the gradients of the scores: in float16
that takes gradients that are not below 1e-4 or so, which bfloat16 does not ask for.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import Empty
from .arithmetic import multiply, narrow
from .launch import MOST_LAUNCHES, Launch
from .relative_attention import HEAD_DIM, LOG2_E, shape_constants
from .relative_places import by_place, by_slot, indicator, load_tables, load_tokens
from .variant import Variant


@triton.jit
def queries_kernel(
    qkv,
    key_vertical,
    key_horizontal,
    value_vertical,
    value_horizontal,
    indicator,
    out,
    grad_out,
    softmax,
    grad_qkv,
    of_places,
    delta,
    grad_tables,
    scale,
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
    TABLES: tl.constexpr,
):
    """Writes the queries' third of `grad_qkv` [S, T, 3*H*D], `delta` [S, H, T] and `of_places` [S, H, T, 3*2*PLACES].

    The three parts of `of_places`: what is added to scores, its rounding to 16 bits, and what is added to the gradient
    of a probability. With TABLES, `grad_tables` [programs, 2, 2*SLOTS, D] too, that of the keys first.
    """
    dtype: tl.constexpr = qkv.dtype.element_ty
    blocks: tl.constexpr = (T + BM - 1) // BM
    unit = tl.program_id(0) // blocks
    sample, head = (unit // heads).to(tl.int64), unit % heads
    query = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    inside = query < T

    base = qkv + sample * sample_stride + head * D
    q = load_tokens(base, query, token_stride, T, D)
    start = (sample * T * heads + head) * D
    d_out = load_tokens(grad_out + start, query, heads * D, T, D)
    result = load_tokens(out + start, query, heads * D, T, D)
    of_query = unit.to(tl.int64) * T + query
    log_sum = tl.load(softmax + of_query, mask=inside, other=0.0)
    drop = tl.sum(result.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta + of_query, drop, mask=inside)

    place = of_places + of_query[:, None] * (6 * PLACES) + tl.arange(0, 2 * PLACES)[None, :]
    key_tables = load_tables(key_vertical, key_horizontal, REACH, SLOTS, D)
    of_slots = multiply(q, tl.trans(key_tables), tl.zeros([BM, 2 * SLOTS], tl.float32))
    bias = by_place(of_slots, query, COLUMNS, REACH, PLACES, SLOTS)
    bias_high = narrow(bias, dtype)
    bias_low = narrow(bias - bias_high.to(tl.float32), dtype)
    tl.store(place, bias_high, mask=inside[:, None])
    tl.store(place + 2 * PLACES, bias_low, mask=inside[:, None])
    value_tables = load_tables(value_vertical, value_horizontal, REACH, SLOTS, D)
    of_slots = multiply(d_out, tl.trans(value_tables), tl.zeros([BM, 2 * SLOTS], tl.float32))
    moved = narrow(by_place(of_slots, query, COLUMNS, REACH, PLACES, SLOTS), dtype)
    tl.store(place + 4 * PLACES, moved, mask=inside[:, None])

    d_q = tl.zeros([BM, D], tl.float32)
    d_sums = tl.zeros([BM, 2 * PLACES], tl.float32)
    p_sums = tl.zeros([BM, 2 * PLACES], tl.float32)
    for first in tl.range(0, T, BN):
        key = first + tl.arange(0, BN)
        k = load_tokens(base + heads * D, key, token_stride, T, D)
        v = load_tokens(base + 2 * heads * D, key, token_stride, T, D)
        at_place = load_tokens(indicator, key, 2 * PLACES, T, 2 * PLACES)
        scores = multiply(bias_high, tl.trans(at_place), tl.zeros([BM, BN], tl.float32))
        if dtype != tl.float32:
            scores = multiply(bias_low, tl.trans(at_place), scores)
        scores = multiply(q, tl.trans(k), scores)
        p = tl.where(key[None, :] < T, tl.exp2(scores * factor - log_sum[:, None]), 0.0)
        d_p = multiply(moved, tl.trans(at_place), tl.zeros([BM, BN], tl.float32))
        d_p = multiply(d_out, tl.trans(v), d_p)
        d_scores = narrow(p * (d_p - drop[:, None]), dtype)
        d_q = multiply(d_scores, k, d_q)
        d_sums = multiply(d_scores, at_place, d_sums)
        if TABLES:
            p_sums = multiply(narrow(p, dtype), at_place, p_sums)

    # A logarithm is below 2^127, which the compiler cannot know: else it keeps the places of every query over the loop.
    again = query + (log_sum > 1.7e38).to(tl.int32)
    d_slots = narrow(by_slot(d_sums, again, COLUMNS, REACH, PLACES, SLOTS, CLIPPED) * scale, dtype)
    key_tables = load_tables(key_vertical, key_horizontal, REACH, SLOTS, D)
    d_q = multiply(d_slots, key_tables, d_q * scale)
    rows = grad_qkv + (sample * T * 3 * heads + head) * D + query[:, None] * (3 * heads * D) + tl.arange(0, D)[None, :]
    tl.store(rows, narrow(d_q, dtype), mask=inside[:, None])
    if TABLES:
        part = tl.arange(0, 2 * SLOTS)[:, None] * D + tl.arange(0, D)[None, :]
        part += tl.program_id(0).to(tl.int64) * (4 * SLOTS * D)
        nothing = tl.zeros([2 * SLOTS, D], tl.float32)
        tl.store(grad_tables + part, multiply(tl.trans(d_slots), q, nothing))
        p_slots = narrow(by_slot(p_sums, again, COLUMNS, REACH, PLACES, SLOTS, CLIPPED), dtype)
        tl.store(grad_tables + 2 * SLOTS * D + part, multiply(tl.trans(p_slots), d_out, nothing))


@triton.jit
def keys_kernel(
    qkv,
    indicator,
    grad_out,
    softmax,
    of_places,
    delta,
    grad_qkv,
    scale,
    factor,
    heads,
    sample_stride,
    token_stride,
    T: tl.constexpr,
    PLACES: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Writes the keys' and values' thirds of `grad_qkv` [S, T, 3*H*D]."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    blocks: tl.constexpr = (T + BN - 1) // BN
    unit = tl.program_id(0) // blocks
    sample, head = (unit // heads).to(tl.int64), unit % heads
    key = tl.program_id(0) % blocks * BN + tl.arange(0, BN)

    base = qkv + sample * sample_stride + head * D
    k = load_tokens(base + heads * D, key, token_stride, T, D)
    v = load_tokens(base + 2 * heads * D, key, token_stride, T, D)
    at_place = tl.trans(load_tokens(indicator, key, 2 * PLACES, T, 2 * PLACES))
    start = grad_out + (sample * T * heads + head) * D
    rows = unit.to(tl.int64) * T

    d_k = tl.zeros([BN, D], tl.float32)
    d_v = tl.zeros([BN, D], tl.float32)
    for first in tl.range(0, T, BM):
        query = first + tl.arange(0, BM)
        q = load_tokens(base, query, token_stride, T, D)
        d_out = load_tokens(start, query, heads * D, T, D)
        log_sum = tl.load(softmax + rows + query, mask=query < T, other=0.0)
        drop = tl.load(delta + rows + query, mask=query < T, other=0.0)
        place = of_places + rows * (6 * PLACES)
        bias = load_tokens(place, query, 6 * PLACES, T, 2 * PLACES)
        scores = multiply(bias, at_place, tl.zeros([BM, BN], tl.float32))
        if dtype != tl.float32:
            bias = load_tokens(place + 2 * PLACES, query, 6 * PLACES, T, 2 * PLACES)
            scores = multiply(bias, at_place, scores)
        scores = multiply(q, tl.trans(k), scores)
        p = tl.exp2(scores * factor - log_sum[:, None])
        d_v = multiply(tl.trans(narrow(p, dtype)), d_out, d_v)
        moved = load_tokens(place + 4 * PLACES, query, 6 * PLACES, T, 2 * PLACES)
        d_p = multiply(moved, at_place, tl.zeros([BM, BN], tl.float32))
        d_p = multiply(d_out, tl.trans(v), d_p)
        d_scores = narrow(p * (d_p - drop[:, None]), dtype)
        d_k = multiply(tl.trans(d_scores), q, d_k)

    target = grad_qkv + ((sample * T * 3 + 1) * heads + head) * D
    target += key[:, None] * (3 * heads * D) + tl.arange(0, D)[None, :]
    tl.store(target, narrow(d_k * scale, dtype), mask=key[:, None] < T)
    tl.store(target + heads * D, narrow(d_v, dtype), mask=key[:, None] < T)


def queries_blocks(dtype: torch.dtype, places: int) -> dict[str, int]:
    """Returns the tile of the pass over queries, and its warps and stages."""
    small = places == 16
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32 if small else 16, "num_warps": 8, "num_stages": 1}
    return {"BM": 64 if small else 32, "BN": 32, "num_warps": 4, "num_stages": 3 if small else 2}


def keys_blocks(dtype: torch.dtype, places: int) -> dict[str, int]:
    """Returns the tile of the pass over keys, and its warps and stages."""
    small = places == 16
    if dtype == torch.float32:
        block = 32 if small else 16
        return {"BM": block, "BN": block, "num_warps": 8, "num_stages": 1}
    block = 64 if small else 32
    return {"BM": block, "BN": block, "num_warps": 4, "num_stages": 2}


def backward(
    qkv: Tensor,
    tables: list[Tensor],
    heads: int,
    grid: tuple[int, int],
    scale: float,
    out: Tensor,
    softmax: Tensor,
    grad_out: Tensor,
    wanted: tuple[bool, bool],
    empty: Empty = torch.empty,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Returns the gradients of `qkv` and of the four tables, each where `wanted`; in the dtype of `qkv`.

    The other arguments are those of `forward` and what it returned; `grad_out` [S, T, H*D] is contiguous.
    """
    samples, tokens, width = qkv.shape
    table_rows = tables[0].shape[0]
    given = (samples, heads, grid, table_rows, scale, qkv.stride(0), qkv.stride(1), wanted[1], qkv.dtype, qkv.device)
    launches = _launches(*given)
    at_place = indicator(grid, launches.places, qkv.dtype, qkv.device)
    grad_qkv = empty((samples, tokens, width), dtype=qkv.dtype, device=qkv.device)
    of_places = torch.empty(samples, heads, tokens, 6 * launches.places, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(softmax)
    parts_shape = (launches.programs if wanted[1] else 0, 2, 2, launches.slots, HEAD_DIM)
    parts = torch.empty(parts_shape, dtype=torch.float32, device=qkv.device)
    if samples:
        launches.queries(qkv, *tables, at_place, out, grad_out, softmax, grad_qkv, of_places, delta, parts)
        if wanted[0]:
            launches.keys(qkv, at_place, grad_out, softmax, of_places, delta, grad_qkv)
    grad_tables = None
    if wanted[1]:
        total = parts.sum(0).to(qkv.dtype)[:, :, :table_rows]
        grad_tables = [total[0, 0], total[0, 1], total[1, 0], total[1, 1]]
    return grad_qkv if wanted[0] else None, grad_tables


@dataclass(frozen=True)
class _Launches:
    queries: Launch
    keys: Launch
    programs: int
    """Of the pass over queries."""
    places: int
    slots: int


@lru_cache(MOST_LAUNCHES)
def _launches(
    samples: int,
    heads: int,
    grid: tuple[int, int],
    table_rows: int,
    scale: float,
    sample_stride: int,
    token_stride: int,
    with_tables: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> _Launches:
    constants = shape_constants(grid, table_rows)
    places = constants["PLACES"]
    numbers = {
        "scale": scale,
        "factor": scale * LOG2_E,
        "heads": heads,
        "sample_stride": sample_stride,
        "token_stride": token_stride,
    }
    of_queries, of_keys = queries_blocks(dtype, places), keys_blocks(dtype, places)
    programs = samples * heads * triton.cdiv(constants["T"], of_queries["BM"])
    queries = Launch(queries_kernel, device, {**numbers, **constants, "TABLES": with_tables, **of_queries}, programs)
    constants_of_keys = {name: constants[name] for name in ("T", "PLACES", "D")}
    keys = Launch(
        keys_kernel,
        device,
        {**numbers, **constants_of_keys, **of_keys},
        samples * heads * triton.cdiv(constants["T"], of_keys["BN"]),
    )
    return _Launches(queries, keys, programs, places, constants["SLOTS"])


def variants() -> Iterator[Variant]:
    """The launches for AutoFormer at 224 x 224, without and with gradients of the tables, and on a larger grid."""
    cases = [((14, 14), False), ((14, 14), True), ((20, 20), True)]
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        types = {
            **dict.fromkeys(("scale", "factor"), "fp32"),
            **dict.fromkeys(("softmax", "delta", "grad_tables"), "*fp32:16"),
            **dict.fromkeys(("sample_stride", "token_stride"), "i32:16"),
            "heads": "i32",
        }
        matrix = dtype != torch.float32
        for grid, with_tables in cases if dtype != torch.float16 else cases[:2]:
            constants = shape_constants(grid, 30)
            chosen = queries_blocks(dtype, constants["PLACES"])
            pointers = [n for n in queries_kernel.arg_names[:12] if n != "softmax" and n != "delta"]
            yield Variant(
                name=f"relative_attention queries {name} {grid[0]}x{grid[1]}" + " tables" * with_tables,
                kernel=queries_kernel,
                types={**types, **dict.fromkeys(pointers, f"*{name}:16")},
                constants={**constants, "BM": chosen["BM"], "BN": chosen["BN"], "TABLES": with_tables},
                warps=chosen["num_warps"],
                stages=chosen["num_stages"],
                matrix=matrix,
                pipelined=matrix,
            )
            if grid == (14, 14) and with_tables:
                continue
            chosen = keys_blocks(dtype, constants["PLACES"])
            pointers = ["qkv", "indicator", "grad_out", "of_places", "grad_qkv"]
            yield Variant(
                name=f"relative_attention keys {name} {grid[0]}x{grid[1]}",
                kernel=keys_kernel,
                types={**types, **dict.fromkeys(pointers, f"*{name}:16")},
                constants={
                    **{key: constants[key] for key in ("T", "PLACES", "D")},
                    "BM": chosen["BM"],
                    "BN": chosen["BN"],
                },
                warps=chosen["num_warps"],
                stages=chosen["num_stages"],
                matrix=matrix,
                pipelined=matrix,
            )
