"""Moments over groups of samples of weight gradients g_k = sum over n in group k of d_n^T a_n, of many weights at once.

Three launches: `largest_magnitudes` finds the scale of every problem, `moments_of_tiles` (or `moments_of_windows`, or
`moments_of_depthwise`) works through the tiles of all problems with a fixed grid of programs, `sums_of_tiles` adds the
tiles' sums up in float64, problem by problem, in the order of the tiles. No float atomics: a problem has the same bits
whatever else shares its launch. No g is ever stored; the memory used is 40 bytes a tile, 104 where SIGNED. On a Hopper
GPU, csrc/cuda/gradient_moments.cuh can take the place of `moments_of_tiles`; see there what that is for.

Cost of a weight [O, I] over S samples of T rows: 2 * S * T * O * I FLOP; S * T * (O / BO * I + I / BI * O) elements
read, of which those beyond S * T * (O + I) come from the L2 cache, since the tiles in flight share their operands.
Floor: the larger of the FLOP time and of the time of S * T * (O + I) elements. AutoFormer-Tiny's widest layer (240 x
960, T = 197, S = 64, bf16) is 5.8 GFLOP and 30 MB on an H200: 7.4 us of multiplication, 7.0 us of memory.

Why these tiles: a weight has three float32 values in registers for as long as its tile is worked on (g, mean, squared
deviations), so 128 x 128 in 8 warps takes 192 of the 255 a thread may have, and nothing larger fits. Its intensity is
64 FLOP for each byte that enters shared memory, so the L2 cache and not the matrix unit may well set the pace on an
H200; no time has been measured yet. What else keeps registers within bounds, seen in ahead-of-time compilation for
sm_90 (all of it in tests/kernels/resources.json):

- one flat loop over (sample, chunk of rows) whose `if` ends a group, not two nested loops: 20 to 50 fewer;
- pointers that step by 32-bit amounts, not products of 64-bit strides, which live in registers as they come from a
  table; what the end of a tile needs is read again there (volatile);
- one reduction of five values at the end, rsqrt for square root and division: 236 registers and no spill, against 255
  and 26 words spilled;
- 8 warps for windows: their addresses and masks spill with 4;
- signed moments are three values a weight more, and the addresses of maps two, so where either is asked for tiles have
  half the weights or fewer: with maps, 128 x 128 spills 1557 times;
- which weights a tile has, which maps and saliencies need at its end, is worked out again there, in 32 bits.

The compiler knows alignment because widths, strides and pointers are in the table in units of UNIT elements, and
pointers are marked; without either, loads are scalar and the software pipeline is silently left out. TF32 on sm_90
needs d and a with rows of a sample innermost, so it copies 4 bytes at a time there.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, name-defined, valid-type"

from __future__ import annotations

import triton
import triton.language as tl

from .gradient_moments_shared import (
    A_SAMPLE,
    A_X,
    D_SAMPLE,
    D_X,
    FIRST_TILE,
    FIRST_USE,
    GROUPS,
    HEIGHT_UNITS,
    IN_GROUP,
    PROBLEM_FIELDS,
    ROWS,
    SLOT,
    USE_FIELDS,
    WIDTH_UNITS,
    A,
    D,
    finish_signed_tile,
    finish_tile,
    power_of_two,
    problem_of,
    scale_exponent,
    sign_of,
    with_group,
)


@triton.jit(do_not_specialize=["problem_count", "first_tile", "end_tile"])
def moments_of_tiles(
    problems,
    uses,
    ends,
    magnitudes,
    partials,
    signed_partials,
    weights,
    problem_count,
    first_tile,
    end_tile,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    MAPS: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Linear weights used once, last dimensions contiguous: five sums a tile to partials[tile, 5]."""
    BYTES: tl.constexpr = UNIT * SOURCE.primitive_bitwidth // 8
    for tile in range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        row = problems + problem_of(ends, problem_count, tile) * PROBLEM_FIELDS
        width = tl.load(row + WIDTH_UNITS).to(tl.int32) * UNIT
        number = tile - tl.load(row + FIRST_TILE).to(tl.int32)
        across = (width + BI - 1) // BI
        o = number // across * BO + tl.arange(0, BO)
        i = number % across * BI + tl.arange(0, BI)
        a_live = (i < width)[None, :]
        d_live = (o < tl.load(row + HEIGHT_UNITS).to(tl.int32) * UNIT)[None, :]
        scale = power_of_two(scale_exponent(magnitudes, tl.load(row + SLOT))).to(REAL)
        use = uses + tl.load(row + FIRST_USE) * USE_FIELDS
        a = tl.multiple_of((tl.load(use + A) * BYTES).to(tl.pointer_type(SOURCE)), BYTES)
        d = tl.multiple_of((tl.load(use + D) * BYTES).to(tl.pointer_type(SOURCE)), BYTES)
        a_row = tl.load(use + A_X).to(tl.int32) * UNIT
        d_row = tl.load(use + D_X).to(tl.int32) * UNIT
        rows = tl.load(use + ROWS).to(tl.int32)
        chunks = (rows + BT - 1) // BT
        # From the last chunk of a sample to the first of the next.
        a_jump = tl.load(use + A_SAMPLE).to(tl.int32) * UNIT - (chunks - 1) * BT * a_row
        d_jump = tl.load(use + D_SAMPLE).to(tl.int32) * UNIT - (chunks - 1) * BT * d_row
        t = tl.arange(0, BT)
        a_offsets = t[:, None] * a_row + i[None, :]
        d_offsets = t[:, None] * d_row + o[None, :]
        mean = tl.zeros((BO, BI), REAL)
        deviations = tl.zeros((BO, BI), REAL)
        if SIGNED:
            signed_mean = tl.zeros((BO, BI), REAL)
            signed_deviations = tl.zeros((BO, BI), REAL)
            signs = tl.zeros((BO, BI), REAL)
        g = tl.zeros((BO, BI), REAL)
        left = rows
        a_group = chunks * tl.load(row + IN_GROUP).to(tl.int32)
        for step in range(0, tl.load(row + GROUPS).to(tl.int32) * a_group):
            live = (t < left)[:, None]
            d_tile = tl.load(d + d_offsets, mask=live & d_live, other=0.0)
            a_tile = tl.load(a + a_offsets, mask=live & a_live, other=0.0)
            # Selects, not branches: the loads of later steps are issued ahead of this step's product.
            last = left <= BT
            a += tl.where(last, a_jump, a_row * BT)
            d += tl.where(last, d_jump, d_row * BT)
            left = tl.where(last, rows, left - BT)
            g = tl.dot(tl.trans(d_tile.to(COMPUTE)), a_tile.to(COMPUTE), g, input_precision=PRECISION, out_dtype=REAL)
            if step % a_group == a_group - 1:
                group = tl.cast(step // a_group, REAL)
                mean, deviations = with_group(mean, deviations, tl.abs(g) * scale, group)
                if SIGNED:
                    signed_mean, signed_deviations = with_group(signed_mean, signed_deviations, g * scale, group)
                    signs += sign_of(g)
                g = tl.zeros((BO, BI), REAL)
        finish_tile(partials, tile, mean, deviations, row, magnitudes, MAPS, INTERPRETED)
        if SIGNED:
            finish_signed_tile(
                signed_partials,
                weights,
                tile,
                signed_mean,
                signed_deviations,
                signs,
                row,
                magnitudes,
                WEIGHT,
                MAPS,
                INTERPRETED,
            )
