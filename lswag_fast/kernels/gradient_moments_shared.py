"""What the kernels of gradient moments share: their tables, the scale, Welford's update, and the sums of tiles.

Sums of a tile leave it in five float64 numbers for |g|, and in eight more for the signed g where those are asked for.
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
    MAPS_AT,
    IS_SIGNED,
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
    MULTIPLIER,
) = (tl.constexpr(n) for n in range(24))
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
    LANES,
) = (tl.constexpr(n) for n in range(16))
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
WEIGHT_FIELDS = tl.constexpr(3)
WEIGHT_AT, WEIGHT_ROW, WEIGHT_COLUMN = (tl.constexpr(n) for n in range(3))
"""A row a problem, by its slot: where its weight lies, and the strides of the weight as a matrix."""
SUMS = tl.constexpr(5)
SIGNED_SUMS = tl.constexpr(8)
RESULTS = tl.constexpr(8)
"""Numbers a problem: its sums, the exponent of the scale, two magnitudes; SIGNED_SUMS more where any is signed."""
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
def scale_exponent(magnitudes, slot):
    """The power of two that a weight's gradients are multiplied by."""
    a = tl.load(magnitudes + 2 * slot) >> 23
    d = tl.load(magnitudes + 2 * slot + 1) >> 23
    return tl.minimum(tl.maximum(SCALED_EXPONENT - (a - 127) - (d - 127), -126), 127)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float32, from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def problem_of(ends, problem_count, tile):
    """The problem that a tile belongs to."""
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
def with_group(mean, deviations, x, group):
    """Welford's update by the value of group number `group`: equal ones leave deviations of exactly 0."""
    difference = x - mean
    mean += difference * (1.0 / (group + 1.0))
    deviations += difference * (difference * (group / (group + 1.0)))
    return mean, deviations


@triton.jit
def _add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def sign_of(g):
    """1 where g > 0, -1 where g < 0, else (also for NaN) 0."""
    return tl.where(g > 0, 1.0, 0.0).to(g.dtype) - tl.where(g < 0, 1.0, 0.0).to(g.dtype)


@triton.jit
def _add_six(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def finish_tile(partials, tile, mean, deviations, row, magnitudes, MAPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sums the moments of |g| over a tile of weights, and writes their maps."""
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
        maps, inside, numel, unit = _place_in_maps(row, tile, magnitudes, mean.shape[0], mean.shape[1])
        tl.store(maps, sigma.to(tl.float64) * unit, mask=inside)
        tl.store(maps + numel, mean.to(tl.float64) * unit, mask=inside)


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def finish_signed_tile(
    partials,
    weights,
    tile,
    mean,
    deviations,
    signs,
    row,
    magnitudes,
    WEIGHT: tl.constexpr,
    MAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums the moments of the signed g over a tile of weights, and writes their maps.

    Where WEIGHT is the type of a weight w, also mean g * w and its magnitude; their sums are 0 where it is None.
    """
    variance = deviations / tl.load(row + GROUPS, volatile=True).to(mean.dtype)
    square = mean * mean
    still = variance <= square * DEAD_SQUARED
    ratio = tl.where(still, 0.0, square / tl.where(still, 1.0, variance))
    sigma = variance * tl.rsqrt(tl.where(variance == 0, 1.0, variance))
    live = tl.where(still, 0.0, 1.0).to(mean.dtype)
    if INTERPRETED:
        sums = (tl.sum(live), tl.sum(ratio), tl.sum(tl.abs(mean)), tl.sum(square), tl.sum(sigma), tl.sum(tl.abs(signs)))
    else:
        sums = tl.reduce((live, ratio, tl.abs(mean), square, sigma, tl.abs(signs)), None, _add_six)
    place = partials + tl.cast(tile, tl.int64) * SIGNED_SUMS
    for s in tl.static_range(6):
        tl.store(place + s, sums[s].to(tl.float64))
    if WEIGHT is None:
        tl.store(place + 6, 0.0)
        tl.store(place + 7, 0.0)
    else:
        saliencies = _saliencies(weights, tile, mean, row, WEIGHT, INTERPRETED)
        tl.store(place + 6, saliencies[0].to(tl.float64))
        tl.store(place + 7, saliencies[1].to(tl.float64))
    if MAPS:
        maps, inside, numel, unit = _place_in_maps(row, tile, magnitudes, mean.shape[0], mean.shape[1])
        tl.store(maps + 2 * numel, sigma.to(tl.float64) * unit, mask=inside)
        tl.store(maps + 3 * numel, mean.to(tl.float64) * unit, mask=inside)
        tl.store(maps + 4 * numel, signs.to(tl.float64), mask=inside)


@triton.jit
def _saliencies(weights, tile, mean, row, WEIGHT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Returns the sums of mean * w and of |mean * w| over a tile."""
    line, column, inside = _weights_of(row, tile, mean.shape[0], mean.shape[1])
    entry = weights + tl.load(row + SLOT, volatile=True) * WEIGHT_FIELDS
    w = tl.load(entry + WEIGHT_AT).to(tl.pointer_type(WEIGHT))
    places = line[:, None] * tl.load(entry + WEIGHT_ROW).to(tl.int32)
    places += column[None, :] * tl.load(entry + WEIGHT_COLUMN).to(tl.int32)
    product = mean * tl.load(w + places, mask=inside, other=0.0).to(mean.dtype)
    if INTERPRETED:
        sums = (tl.sum(product), tl.sum(tl.abs(product)))
    else:
        sums = tl.reduce((product, tl.abs(product)), None, _add_two)
    return sums


@triton.jit
def _weights_of(row, tile, BO: tl.constexpr, BI: tl.constexpr):
    """Returns the weights of a tile as lines and columns of all planes one below the other, and which exist.

    Worked out again from the table, so that nothing of it is in registers while the tile is worked on.
    """
    height = tl.load(row + HEIGHT, volatile=True).to(tl.int32)
    width = tl.load(row + WIDTH, volatile=True).to(tl.int32)
    in_plane = tl.load(row + TILES_IN_PLANE, volatile=True).to(tl.int32)
    number = tile - tl.load(row + FIRST_TILE, volatile=True).to(tl.int32)
    plane = number // in_plane
    number -= plane * in_plane
    across = (width + BI - 1) // BI
    o = number // across * BO + tl.arange(0, BO)
    i = number % across * BI + tl.arange(0, BI)
    return plane * height + o, i, (o < height)[:, None] & (i < width)[None, :]


@triton.jit
def _place_in_maps(row, tile, magnitudes, BO: tl.constexpr, BI: tl.constexpr):
    """Returns where the first map has the weights of a tile, which exist, the numel of a map, and its unit."""
    line, column, inside = _weights_of(row, tile, BO, BI)
    height = tl.load(row + HEIGHT)
    width = tl.load(row + WIDTH)
    index = line[:, None].to(tl.int64) * width + column[None, :]
    exponent = scale_exponent(magnitudes, tl.load(row + SLOT))
    unit = 1.0 / (power_of_two(exponent).to(tl.float64) * tl.load(row + GROUP_SIZE).to(tl.float64))
    maps = tl.load(row + MAPS_AT).to(tl.pointer_type(tl.float64)) + index
    numel = tl.load(row + TILES_OF) // tl.load(row + TILES_IN_PLANE) * height * width
    return maps, inside, numel, unit


@triton.jit
def sums_of_tiles(problems, magnitudes, partials, signed_partials, results, BLOCK: tl.constexpr, SIGNED: tl.constexpr):
    """Adds up the tiles of each problem in a fixed order: results[slot] of float64.

    The five sums, the exponent of the scale, the bits of the largest |a| and |d| seen; where any problem is SIGNED,
    eight more sums, which are 0 where this one is not.
    """
    row = problems + tl.program_id(0) * PROBLEM_FIELDS
    slot = tl.load(row + SLOT)
    first = tl.load(row + FIRST_TILE)
    count = tl.load(row + TILES_OF)
    place = results + slot * (RESULTS + SIGNED_SUMS if SIGNED else RESULTS)
    _add_up(partials + first * SUMS, count, place, SUMS, BLOCK)
    tl.store(place + 5, scale_exponent(magnitudes, slot).to(tl.float64))
    tl.store(place + 6, tl.load(magnitudes + 2 * slot).to(tl.float64))
    tl.store(place + 7, tl.load(magnitudes + 2 * slot + 1).to(tl.float64))
    if SIGNED:
        signed_count = count * tl.load(row + IS_SIGNED)
        _add_up(signed_partials + first * SIGNED_SUMS, signed_count, place + RESULTS, SIGNED_SUMS, BLOCK)


@triton.jit
def _add_up(partials, count, results, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    for s in tl.static_range(COLUMNS):
        total = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, count, BLOCK):
            place = partials + (begin + index) * COLUMNS + s
            total += tl.load(place, mask=begin + index < count, other=0.0)
        tl.store(results + s, tl.sum(total))
