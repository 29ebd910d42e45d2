// Where the rows and columns of a gradient operand lie: any strides, gathered through the taps of a convolution.
#pragma once

#include "lswag/gradient_moments.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

constexpr int64_t kChunkRows = 256;

// Where consecutive rows of an operand lie: offsets in elements, and positions in a padded plane.
struct RowTable {
    int64_t count;
    int64_t offset[kChunkRows];
    int32_t y[kChunkRows];
    int32_t x[kChunkRows];
};

inline void place_line(const GradientOperand& operand, int64_t y, int64_t x, int64_t row, int64_t count,
                       RowTable& table) {
    const PlaneAxis &down = operand.axes[0], &across = operand.axes[1];
    for (int64_t i = 0; i < count; ++i) {
        table.y[row + i] = static_cast<int32_t>(y * down.row_step - down.pad);
        table.x[row + i] = static_cast<int32_t>((x + i) * across.row_step - across.pad);
    }
}

// Lists `count` <= kChunkRows rows from row `begin` on, counted through the samples from `sample` on.
inline void list_rows(const GradientOperand& operand, int64_t rows_a_sample, int64_t sample, int64_t begin,
                      int64_t count, RowTable& table) {
    int64_t index[kRowDims] = {};
    sample += begin / rows_a_sample;
    int64_t rest = begin % rows_a_sample;
    for (int d = operand.row_dims - 1; d >= 0; --d) {
        index[d] = rest % operand.row_shape[d];
        rest /= operand.row_shape[d];
    }
    table.count = count;
    const int last = operand.row_dims - 1;
    for (int64_t row = 0; row < count;) {
        int64_t offset = operand.offset + sample * operand.sample_stride;
        for (int d = 0; d <= last; ++d) offset += index[d] * operand.row_strides[d];
        const int64_t left = operand.row_shape[last] - index[last], line = left < count - row ? left : count - row;
        for (int64_t i = 0; i < line; ++i) table.offset[row + i] = offset + i * operand.row_strides[last];
        if (operand.padded) place_line(operand, index[0], index[1], row, line, table);
        row += line;
        index[last] = 0;
        int d = last - 1;
        while (d >= 0 && ++index[d] == operand.row_shape[d]) index[d--] = 0;
        if (d < 0) ++sample;
    }
}

// Neighbouring columns that are neighbours in memory too, and lie inside the plane together.
struct ColumnRun {
    int begin;
    int length;
    int64_t offset;
    int32_t y;
    int32_t x;
};

// Lists `width` columns from `first` on as runs; returns how many.
inline int list_columns(const GradientOperand& operand, int64_t first, int width, ColumnRun* runs) {
    const int64_t inner = operand.column_shape[2], middle = operand.column_shape[1];
    int count = 0;
    for (int m = 0; m < width; ++m) {
        const int64_t column = first + m;
        const int64_t index[kColumnDims] = {column / (inner * middle), column / inner % middle, column % inner};
        ColumnRun run{m, 1, 0, 0, 0};
        for (int d = 0; d < kColumnDims; ++d) run.offset += index[d] * operand.column_strides[d];
        if (operand.padded) {
            run.y = static_cast<int32_t>(index[operand.axes[0].column_dim] * operand.axes[0].column_step);
            run.x = static_cast<int32_t>(index[operand.axes[1].column_dim] * operand.axes[1].column_step);
        }
        ColumnRun* const last = runs + count - 1;
        if (count > 0 && run.offset == last->offset + last->length && run.y == last->y && run.x == last->x)
            ++last->length;
        else
            runs[count++] = run;
    }
    return count;
}

inline bool inside(const GradientOperand& operand, const RowTable& rows, int64_t row, const ColumnRun& run) {
    if (!operand.padded) return true;
    return static_cast<uint64_t>(rows.y[row] + run.y) < static_cast<uint64_t>(operand.axes[0].size) &&
           static_cast<uint64_t>(rows.x[row] + run.x) < static_cast<uint64_t>(operand.axes[1].size);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
