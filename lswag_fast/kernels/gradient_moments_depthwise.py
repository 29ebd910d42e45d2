"""Moments of depthwise convolutions: a group has one input channel, so there is no matrix product but correlation.

Cost of a kernel [O, 1, KH, KW] over S samples of OH x OW positions: 2 * S * OH * OW * O * KH * KW FLOP; S * (C * H * W
+ O * OH * OW) elements read, so 4.5 FLOP a byte for 3 x 3, stride 1, bfloat16, where an H200 does 15 in float32.
Floor: the time of those elements, 18 us for 96 channels of 56 x 56, S = 64, in bfloat16 (77 MB). This kernel issues
some six instructions (load, address, conversion, addition of a product, its share of the masks) for each of 16 places
for taps (or 32 at a time, for larger kernels), which bounds it at about four times that floor for 3 x 3; as a matrix
product, of which one row in 64 is used, the same layer takes 158 GFLOP. Neither has been timed yet.

Lanes of a warp lie along a row of output positions, so planes that are contiguous are read in whole lines; with
channels last, BO neighbouring channels share a line. What depends on a lane and a tap is worked out once a use; a step
through the plane moves all of it by the same distance. A program works on BO channels through all samples, one after
the other: a layer alone fills a GPU from a thousand channels on, a grouped launch of many layers in any case.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, name-defined, valid-type"
from __future__ import annotations

import triton
import triton.language as tl

from .gradient_moments_shared import (
    A_CHANNEL,
    A_HEIGHT,
    A_SAMPLE,
    A_WIDTH,
    A_X,
    A_Y,
    D_CHANNEL,
    D_HEIGHT,
    D_SAMPLE,
    D_WIDTH,
    D_X,
    D_Y,
    DILATION_X,
    DILATION_Y,
    FIRST_TILE,
    FIRST_USE,
    GROUPS,
    HEIGHT_UNITS,
    IN_GROUP,
    KERNEL_X,
    LANES,
    MULTIPLIER,
    PADDING_X,
    PADDING_Y,
    PROBLEM_FIELDS,
    SLOT,
    STRIDE_X,
    STRIDE_Y,
    USE_FIELDS,
    USES,
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
def moments_of_depthwise(
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
    A_SOURCE: tl.constexpr,
    D_SOURCE: tl.constexpr,
    REAL: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    MAPS: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Kernels [O, 1, KH, KW], O a multiple of the C groups: rows of the weight are o, columns its taps."""
    for tile in range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        row = problems + problem_of(ends, problem_count, tile) * PROBLEM_FIELDS
        height = tl.load(row + HEIGHT_UNITS).to(tl.int32)
        width = tl.load(row + WIDTH_UNITS).to(tl.int32)
        kernel_w = tl.load(row + KERNEL_X).to(tl.int32)
        number = tile - tl.load(row + FIRST_TILE).to(tl.int32)
        across = (width + BI - 1) // BI
        o = number // across * BO + tl.arange(0, BO)
        i = number % across * BI + tl.arange(0, BI)
        tap_y = i // kernel_w * tl.load(row + DILATION_Y).to(tl.int32) - tl.load(row + PADDING_Y).to(tl.int32)
        tap_x = i % kernel_w * tl.load(row + DILATION_X).to(tl.int32) - tl.load(row + PADDING_X).to(tl.int32)
        stride_y = tl.load(row + STRIDE_Y).to(tl.int32)
        stride_x = tl.load(row + STRIDE_X).to(tl.int32)
        channel = o // tl.load(row + MULTIPLIER).to(tl.int32)
        scale = power_of_two(scale_exponent(magnitudes, tl.load(row + SLOT))).to(REAL)
        in_group = tl.load(row + IN_GROUP).to(tl.int32)
        mean = tl.zeros((BO, BI), REAL)
        deviations = tl.zeros((BO, BI), REAL)
        if SIGNED:
            signed_mean = tl.zeros((BO, BI), REAL)
            signed_deviations = tl.zeros((BO, BI), REAL)
            signs = tl.zeros((BO, BI), REAL)
        for group in range(0, tl.load(row + GROUPS).to(tl.int32)):
            products = tl.zeros((BO, BI, BT), REAL)
            for number_of_use in range(0, tl.load(row + USES).to(tl.int32)):
                use = uses + (tl.load(row + FIRST_USE) + number_of_use) * USE_FIELDS
                out_h = tl.load(use + D_HEIGHT).to(tl.int32)
                out_w = tl.load(use + D_WIDTH).to(tl.int32)
                a_h = tl.load(use + A_HEIGHT).to(tl.uint32)
                a_w = tl.load(use + A_WIDTH).to(tl.uint32)
                lanes = tl.load(use + LANES).to(tl.int32)
                step_y = BT // lanes
                in_row = (out_w + lanes - 1) // lanes
                in_plane = (out_h + step_y - 1) // step_y * in_row
                lane_y = tl.arange(0, BT) // lanes
                lane_x = tl.arange(0, BT) % lanes
                y = (lane_y * stride_y)[None, :] + tap_y[:, None]
                x = (lane_x * stride_x)[None, :] + tap_x[:, None]
                a_offsets = y * tl.load(use + A_Y).to(tl.int32) + x * tl.load(use + A_X).to(tl.int32)
                a_offsets = (channel * tl.load(use + A_CHANNEL).to(tl.int32))[:, None, None] + a_offsets[None, :, :]
                d_offsets = lane_y * tl.load(use + D_Y).to(tl.int32) + lane_x * tl.load(use + D_X).to(tl.int32)
                d_offsets = (o * tl.load(use + D_CHANNEL).to(tl.int32))[:, None] + d_offsets[None, :]
                taps_live = (i < width)[:, None]
                for step in range(0, in_group * in_plane):
                    sample = tl.cast(group * in_group + step // in_plane, tl.int64)
                    begin_y = step % in_plane // in_row * step_y
                    begin_x = step % in_row * lanes
                    positions_live = (lane_y < out_h - begin_y) & (lane_x < out_w - begin_x)
                    # One comparison as unsigned numbers sees both ends of the plane.
                    inside = (y + begin_y * stride_y).to(tl.uint32, bitcast=True) < a_h
                    inside &= (x + begin_x * stride_x).to(tl.uint32, bitcast=True) < a_w
                    inside &= taps_live & positions_live[None, :]
                    a = tl.load(use + A).to(tl.pointer_type(A_SOURCE)) + sample * tl.load(use + A_SAMPLE)
                    a += begin_y * stride_y * tl.load(use + A_Y) + begin_x * stride_x * tl.load(use + A_X)
                    d = tl.load(use + D).to(tl.pointer_type(D_SOURCE)) + sample * tl.load(use + D_SAMPLE)
                    d += begin_y * tl.load(use + D_Y) + begin_x * tl.load(use + D_X)
                    d_live = (o < height)[:, None] & positions_live[None, :]
                    a_live = (o < height)[:, None, None] & inside[None, :, :]
                    d_tile = tl.load(d + d_offsets, mask=d_live, other=0.0).to(REAL)
                    a_tile = tl.load(a + a_offsets, mask=a_live, other=0.0).to(REAL)
                    products += d_tile[:, None, :] * a_tile
            g = tl.sum(products, 2)
            number_of_group = tl.cast(group, REAL)
            mean, deviations = with_group(mean, deviations, tl.abs(g) * scale, number_of_group)
            if SIGNED:
                signed_mean, signed_deviations = with_group(signed_mean, signed_deviations, g * scale, number_of_group)
                signs += sign_of(g)
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
