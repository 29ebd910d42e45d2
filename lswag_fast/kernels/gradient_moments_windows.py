"""Moments of weights that `moments_of_tiles` cannot read: convolutions, any strides, several uses of one weight."""

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
    KERNEL_Y,
    PADDING_X,
    PADDING_Y,
    PROBLEM_FIELDS,
    ROWS,
    SLOT,
    STRIDE_X,
    STRIDE_Y,
    TILES_IN_PLANE,
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
def moments_of_windows(
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
    COMPUTE: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    MAPS: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Any weight: convolutions whose windows are gathered where they lie, any strides, several uses of one weight.

    Columns of the weight are (channel, kernel row, kernel column), rows of a sample the output positions. A linear
    layer is a 1 x 1 kernel on a plane of one row.
    """
    for tile in range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        row = problems + problem_of(ends, problem_count, tile) * PROBLEM_FIELDS
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
        scale = power_of_two(scale_exponent(magnitudes, tl.load(row + SLOT))).to(REAL)
        in_group = tl.load(row + IN_GROUP).to(tl.int32)
        mean = tl.zeros((BO, BI), REAL)
        deviations = tl.zeros((BO, BI), REAL)
        if SIGNED:
            signed_mean = tl.zeros((BO, BI), REAL)
            signed_deviations = tl.zeros((BO, BI), REAL)
            signs = tl.zeros((BO, BI), REAL)
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
