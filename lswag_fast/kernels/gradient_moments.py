"""Moments over groups of samples of weight gradients g_k = sum over n in group k of d_n^T a_n, of many weights at once.

Three launches: `largest_magnitudes` finds the scale of every problem, `moments_of_tiles` (or `moments_of_windows`)
works through the tiles of all problems with a fixed grid of programs, `sums_of_tiles` adds the tiles' sums up in
float64, problem by problem, in the order of the tiles. No float atomics: a problem has the same bits whatever else
shares its launch. No g is ever stored; the memory used is 40 bytes a tile.

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
- 8 warps for windows: their addresses and masks spill with 4.

The compiler knows alignment because widths, strides and pointers are in the table in units of UNIT elements, and
pointers are marked; without either, loads are scalar and the software pipeline is silently left out. TF32 on sm_90
needs d and a with rows of a sample innermost, so it copies 4 bytes at a time there.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, name-defined, valid-type"

from __future__ import annotations

import triton
import triton.language as tl

PROBLEM_FIELDS = tl.constexpr(24)
USE_FIELDS = tl.constexpr(16)
OPERAND_FIELDS = tl.constexpr(16)
# What the columns of the three int64 tables hold; gradient_moments_launch.py fills them.
(
    HEIGHT_UNITS,
    WIDTH_UNITS,
    GROUPS,
    IN_GROUP,
    FIRST_USE,
    USES,
    FIRST_TILE,
    SLOT,
    TILES_OF,
    SIGMA_MAP,
    MEAN_MAP,
    GROUP_SIZE,
    DILATION_X,
    HEIGHT,
    WIDTH,
    TILES_IN_PLANE,
    KERNEL_Y,
    KERNEL_X,
    STRIDE_Y,
    STRIDE_X,
    PADDING_Y,
    PADDING_X,
    DILATION_Y,
) = (tl.constexpr(n) for n in range(23))
"""A row a problem; widths and strides in units of UNIT elements where `moments_of_tiles` reads them."""
(
    A,
    A_SAMPLE,
    A_X,
    A_Y,
    A_CHANNEL,
    A_HEIGHT,
    A_WIDTH,
    D,
    D_SAMPLE,
    D_X,
    D_Y,
    D_CHANNEL,
    D_HEIGHT,
    D_WIDTH,
    ROWS,
) = (tl.constexpr(n) for n in range(15))
"""A row a use of a weight: pointers and strides."""
(
    SOURCE_AT,
    SIZE_0,
    SIZE_1,
    SIZE_2,
    SIZE_3,
    STEP_0,
    STEP_1,
    STEP_2,
    STEP_3,
    EVERY,
    MAGNITUDE,
) = (tl.constexpr(n) for n in range(11))
"""A row an operand, as four sizes and strides."""
SUMS = tl.constexpr(5)
RESULTS = tl.constexpr(8)
DEAD_SQUARED = tl.constexpr(2.0**-44)
SCALED_EXPONENT = tl.constexpr(24)
"""Of the largest |a| times the largest |d|: sums of 2^30 of these products and their squares stay finite, and a sigma
2^-80 times the largest g still has a normal square."""


@triton.jit
def largest_magnitudes(operands, magnitudes, SOURCE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Raises the int32 at magnitudes[slot] to the bits of the largest |x| on one of `every` lines of an operand.

    Bits of magnitudes are ordered as the magnitudes are, so an integer maximum does, and it has one result whatever
    the order. Infinity and NaN lie above all numbers.
    """
    row = operands + tl.program_id(0) * OPERAND_FIELDS
    source = tl.load(row + SOURCE_AT).to(tl.pointer_type(SOURCE))
    size_1 = tl.load(row + SIZE_1)
    size_2 = tl.load(row + SIZE_2)
    size_3 = tl.load(row + SIZE_3)
    step_3 = tl.load(row + STEP_3)
    every = tl.load(row + EVERY)
    end = tl.load(row + SIZE_0) * size_1 * size_2
    lines = (end + every - 1) // every
    largest = tl.zeros((LINES, COLUMNS), tl.int32)
    begin = tl.program_id(1).to(tl.int64) * LINES
    while begin < lines:
        number = begin + tl.arange(0, LINES)
        # One line of each `every`, at a place that varies: the same token of every sample may be a special one, such as
        # a class token without gradient.
        line = tl.minimum(number * every + ((number * 2654435761) >> 8) % every, end - 1)
        plane = line // size_2
        place = plane // size_1 * tl.load(row + STEP_0) + plane % size_1 * tl.load(row + STEP_1)
        place += line % size_2 * tl.load(row + STEP_2)
        for first in range(0, size_3.to(tl.int32), COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            live = (number < lines)[:, None] & (column < size_3)[None, :]
            x = tl.load(source + (place[:, None] + column[None, :] * step_3), mask=live, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        begin += tl.num_programs(1).to(tl.int64) * LINES
    tl.atomic_max(magnitudes + tl.load(row + MAGNITUDE), tl.max(largest), sem="relaxed")


@triton.jit
def _scale_exponent(magnitudes, slot):
    a = tl.load(magnitudes + 2 * slot) >> 23
    d = tl.load(magnitudes + 2 * slot + 1) >> 23
    return tl.minimum(tl.maximum(SCALED_EXPONENT - (a - 127) - (d - 127), -126), 127)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _problem_of(ends, problem_count, tile):
    low = 0
    high = problem_count
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends + middle) <= tile:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _with_group(mean, deviations, g, scale, group):
    # Welford's update: equal magnitudes leave deviations of exactly 0.
    difference = tl.abs(g) * scale - mean
    mean += difference * (1.0 / (group + 1.0))
    deviations += difference * (difference * (group / (group + 1.0)))
    return mean, deviations


@triton.jit
def _add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _finish_tile(
    partials, tile, mean, deviations, row, magnitudes, o, i, MAPS: tl.constexpr, INTERPRETED: tl.constexpr
):
    # `volatile` reads the table again rather than keep what was read before the loop in registers through it.
    variance = deviations / tl.load(row + GROUPS, volatile=True).to(mean.dtype)
    dead = variance <= mean * mean * DEAD_SQUARED
    inverse = tl.rsqrt(tl.where(variance == 0, 1.0, variance))
    sigma = variance * inverse
    inverse = tl.where(dead, 0.0, inverse)
    live = tl.where(dead, 0.0, 1.0).to(mean.dtype)
    # Weights beyond the edges of the tile never have a gradient, so they are dead and add to nothing.
    if INTERPRETED:
        # The interpreter takes a reduction with a combination of our own element by element.
        sums = (tl.sum(live), tl.sum(inverse), tl.sum(mean * inverse), tl.sum(sigma), tl.sum(mean))
    else:
        sums = tl.reduce((live, inverse, mean * inverse, sigma, mean), None, _add_five)
    place = partials + tl.cast(tile, tl.int64) * SUMS
    tl.store(place, sums[0].to(tl.float64))
    tl.store(place + 1, sums[1].to(tl.float64))
    tl.store(place + 2, sums[2].to(tl.float64))
    tl.store(place + 3, sums[3].to(tl.float64))
    tl.store(place + 4, sums[4].to(tl.float64))
    if MAPS:
        height = tl.load(row + HEIGHT)
        width = tl.load(row + WIDTH)
        inside = (o < height)[:, None] & (i < width)[None, :]
        first = tl.cast(tile, tl.int64) - tl.load(row + FIRST_TILE)
        plane = first // tl.load(row + TILES_IN_PLANE) * height * width
        index = plane + o[:, None].to(tl.int64) * width + i[None, :]
        exponent = _scale_exponent(magnitudes, tl.load(row + SLOT))
        unit = 1.0 / (_power_of_two(exponent).to(tl.float64) * tl.load(row + GROUP_SIZE).to(tl.float64))
        tl.store(
            tl.load(row + SIGMA_MAP).to(tl.pointer_type(tl.float64)) + index, sigma.to(tl.float64) * unit, mask=inside
        )
        tl.store(
            tl.load(row + MEAN_MAP).to(tl.pointer_type(tl.float64)) + index, mean.to(tl.float64) * unit, mask=inside
        )


@triton.jit(do_not_specialize=["problem_count", "first_tile", "end_tile"])
def moments_of_tiles(
    problems,
    uses,
    ends,
    magnitudes,
    partials,
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
    INTERPRETED: tl.constexpr,
):
    """Linear weights used once, last dimensions contiguous: five sums a tile to partials[tile, 5]."""
    BYTES: tl.constexpr = UNIT * SOURCE.primitive_bitwidth // 8
    for tile in range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        row = problems + _problem_of(ends, problem_count, tile) * PROBLEM_FIELDS
        width = tl.load(row + WIDTH_UNITS).to(tl.int32) * UNIT
        number = tile - tl.load(row + FIRST_TILE).to(tl.int32)
        across = (width + BI - 1) // BI
        o = number // across * BO + tl.arange(0, BO)
        i = number % across * BI + tl.arange(0, BI)
        a_live = (i < width)[None, :]
        d_live = (o < tl.load(row + HEIGHT_UNITS).to(tl.int32) * UNIT)[None, :]
        scale = _power_of_two(_scale_exponent(magnitudes, tl.load(row + SLOT))).to(REAL)
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
                mean, deviations = _with_group(mean, deviations, g, scale, tl.cast(step // a_group, REAL))
                g = tl.zeros((BO, BI), REAL)
        _finish_tile(partials, tile, mean, deviations, row, magnitudes, o, i, MAPS, INTERPRETED)


@triton.jit(do_not_specialize=["problem_count", "first_tile", "end_tile"])
def moments_of_windows(
    problems,
    uses,
    ends,
    magnitudes,
    partials,
    problem_count,
    first_tile,
    end_tile,
    A_SOURCE: tl.constexpr,
    D_SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    MAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Any weight: convolutions whose windows are gathered where they lie, any strides, several uses of one weight.

    Columns of the weight are (channel, kernel row, kernel column), rows of a sample the output positions. A linear
    layer is a 1 x 1 kernel on a plane of one row.
    """
    for tile in range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        row = problems + _problem_of(ends, problem_count, tile) * PROBLEM_FIELDS
        height = tl.load(row + HEIGHT_UNITS).to(tl.int32)
        width = tl.load(row + WIDTH_UNITS).to(tl.int32)
        kernel_w = tl.load(row + KERNEL_X).to(tl.int32)
        kernel = tl.load(row + KERNEL_Y).to(tl.int32) * kernel_w
        in_plane = tl.load(row + TILES_IN_PLANE).to(tl.int32)
        number = tile - tl.load(row + FIRST_TILE).to(tl.int32)
        channel_group = number // in_plane
        number -= channel_group * in_plane
        across = (width + BI - 1) // BI
        o = number // across * BO + tl.arange(0, BO)
        i = number % across * BI + tl.arange(0, BI)
        channel = channel_group * (width // kernel) + i // kernel
        tap_y = i % kernel // kernel_w * tl.load(row + DILATION_Y).to(tl.int32) - tl.load(row + PADDING_Y).to(tl.int32)
        tap_x = i % kernel_w * tl.load(row + DILATION_X).to(tl.int32) - tl.load(row + PADDING_X).to(tl.int32)
        scale = _power_of_two(_scale_exponent(magnitudes, tl.load(row + SLOT))).to(REAL)
        in_group = tl.load(row + IN_GROUP).to(tl.int32)
        mean = tl.zeros((BO, BI), REAL)
        deviations = tl.zeros((BO, BI), REAL)
        for group in range(0, tl.load(row + GROUPS).to(tl.int32)):
            g = tl.zeros((BO, BI), REAL)
            for number_of_use in range(0, tl.load(row + USES).to(tl.int32)):
                use = uses + (tl.load(row + FIRST_USE) + number_of_use) * USE_FIELDS
                out_w = tl.load(use + D_WIDTH).to(tl.int32)
                rows = tl.load(use + ROWS).to(tl.int32)
                chunks = (rows + BT - 1) // BT
                for step in range(0, in_group * chunks):
                    sample = tl.cast(group * in_group + step // chunks, tl.int64)
                    p = step % chunks * BT + tl.arange(0, BT)
                    out_y = p // out_w
                    out_x = p % out_w
                    y = (out_y * tl.load(row + STRIDE_Y).to(tl.int32))[:, None] + tap_y[None, :]
                    x = (out_x * tl.load(row + STRIDE_X).to(tl.int32))[:, None] + tap_x[None, :]
                    inside = (y >= 0) & (y < tl.load(use + A_HEIGHT).to(tl.int32))
                    inside &= (x >= 0) & (x < tl.load(use + A_WIDTH).to(tl.int32))
                    inside &= (p < rows)[:, None] & (i < width)[None, :]
                    a = tl.load(use + A).to(tl.pointer_type(A_SOURCE)) + sample * tl.load(use + A_SAMPLE)
                    a_offsets = y * tl.load(use + A_Y).to(tl.int32) + x * tl.load(use + A_X).to(tl.int32)
                    a_offsets += (channel * tl.load(use + A_CHANNEL).to(tl.int32))[None, :]
                    d = tl.load(use + D).to(tl.pointer_type(D_SOURCE)) + sample * tl.load(use + D_SAMPLE)
                    d_offsets = out_y * tl.load(use + D_Y).to(tl.int32) + out_x * tl.load(use + D_X).to(tl.int32)
                    d_columns = (channel_group * height + o) * tl.load(use + D_CHANNEL).to(tl.int32)
                    d_live = (p < rows)[:, None] & (o < height)[None, :]
                    d_tile = tl.load(d + d_offsets[:, None] + d_columns[None, :], mask=d_live, other=0.0)
                    a_tile = tl.load(a + a_offsets, mask=inside, other=0.0)
                    g = tl.dot(
                        tl.trans(d_tile.to(COMPUTE)),
                        a_tile.to(COMPUTE),
                        g,
                        input_precision=PRECISION,
                        out_dtype=REAL,
                    )
            mean, deviations = _with_group(mean, deviations, g, scale, tl.cast(group, REAL))
        _finish_tile(partials, tile, mean, deviations, row, magnitudes, o, i, MAPS, INTERPRETED)


@triton.jit
def sums_of_tiles(problems, magnitudes, partials, results, BLOCK: tl.constexpr):
    """Adds up the tiles of each problem in a fixed order: results[slot, 8] of float64.

    The five sums, the exponent of the scale, and the bits of the largest |a| and |d| seen.
    """
    row = problems + tl.program_id(0) * PROBLEM_FIELDS
    slot = tl.load(row + SLOT)
    first = tl.load(row + FIRST_TILE)
    count = tl.load(row + TILES_OF)
    index = tl.arange(0, BLOCK)
    for s in tl.static_range(5):
        total = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, count, BLOCK):
            place = partials + (first + begin + index) * SUMS + s
            total += tl.load(place, mask=begin + index < count, other=0.0)
        tl.store(results + slot * RESULTS + s, tl.sum(total))
    tl.store(results + slot * RESULTS + 5, _scale_exponent(magnitudes, slot).to(tl.float64))
    tl.store(results + slot * RESULTS + 6, tl.load(magnitudes + 2 * slot).to(tl.float64))
    tl.store(results + slot * RESULTS + 7, tl.load(magnitudes + 2 * slot + 1).to(tl.float64))
