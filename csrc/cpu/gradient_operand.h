// Packing of gradient operands into the panels of the micro-kernel: from any strides, gathered through the kernel taps
// of a convolution, padded with zeros, converted and scaled by a power of two on the way.
#pragma once

#include "lswag/gradient_moments.h"
#include "microkernel.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

constexpr int64_t kChunkRows = 256;

// Whether a step of k in a packed panel is a pair of rows.
template <typename Packed>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<uint32_t> = true;

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

template <typename Source>
inline uint32_t scaled_bits(Source value, float scale) {
    const float scaled = to_float(value) * scale;
    uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    return bits;
}

// One element of a panel: float32, or the bits of a bfloat16 (scaling by a power of two is exact there too).
template <typename Source>
inline void convert(Source value, float scale, float* out) {
    *out = to_float(value) * scale;
}
template <typename Source>
inline void convert(Source value, float scale, uint16_t* out) {
    *out = static_cast<uint16_t>(scaled_bits(value, scale) >> 16);
}

template <int Width, typename Source, typename Element>
inline void convert_run(const Source* source, int length, float scale, Element* out) {
    if (length == Width) {
        for (int m = 0; m < Width; ++m) convert(source[m], scale, out + m);
    } else {
        for (int m = 0; m < length; ++m) convert(source[m], scale, out + m);
    }
}

// Panels hold step after step of k: float32 one row a step, bfloat16 two rows, interleaved.
template <int Width, typename Source>
struct PanelWriter {
    const GradientOperand& operand;
    const RowTable& rows;
    const Source* base;  // of the channel group
    float scale;
    ColumnRun runs[Width];
    int run_count;
    int width;

    template <typename Element>
    void fetch_row(int64_t row, Element* line) const {
        for (int m = 0; m < Width; ++m) line[m] = 0;
        for (int r = 0; r < run_count; ++r)
            if (inside(operand, rows, row, runs[r]))
                convert_run<Width>(base + rows.offset[row] + runs[r].offset, runs[r].length, scale,
                                   line + runs[r].begin);
    }

    void by_rows(float* panel) const {
        for (int64_t row = 0; row < rows.count; ++row, panel += Width) fetch_row(row, panel);
    }

    void by_rows(uint32_t* panel) const {
        uint16_t lines[2][Width];
        for (int64_t row = 0; row < rows.count; row += 2, panel += Width) {
            fetch_row(row, lines[0]);
            if (row + 1 < rows.count)
                fetch_row(row + 1, lines[1]);
            else
                __builtin_memset(lines[1], 0, sizeof(lines[1]));
            for (int m = 0; m < Width; ++m) panel[m] = lines[0][m] | static_cast<uint32_t>(lines[1][m]) << 16;
        }
    }

    template <typename Element>
    void column(const ColumnRun& run, int within, Element* out, int64_t even_step, int64_t odd_step) const {
        const Source* const source = base + run.offset + within;
        for (int64_t row = 0; row < rows.count; ++row, out += row % 2 ? odd_step : even_step) {
            *out = 0;
            if (inside(operand, rows, row, run)) convert(source[rows.offset[row]], scale, out);
        }
    }

    void by_columns(float* panel) const {
        __builtin_memset(panel, 0, width == Width ? 0 : sizeof(float) * Width * rows.count);
        for (int r = 0; r < run_count; ++r)
            for (int i = 0; i < runs[r].length; ++i) column(runs[r], i, panel + runs[r].begin + i, Width, Width);
    }

    void by_columns(uint32_t* panel) const {
        const bool whole = width == Width && rows.count % 2 == 0;
        __builtin_memset(panel, 0, whole ? 0 : sizeof(uint32_t) * Width * ((rows.count + 1) / 2));
        uint16_t* const halves = reinterpret_cast<uint16_t*>(panel);
        for (int r = 0; r < run_count; ++r)
            for (int i = 0; i < runs[r].length; ++i)
                column(runs[r], i, halves + 2 * (runs[r].begin + i), 2 * Width - 1, 1);
    }
};

// kLanes columns of one step: of the row as float32, or of the row and the next as pairs of bfloat16.
template <typename Source>
inline vuint convert_step(const Source* row, const Source*, float scale, const float*) {
    return bits_of(load_float(row) * splat(scale));
}
template <typename Source>
inline vuint convert_step(const Source* row, const Source* next, float scale, const uint32_t*) {
    const vuint low = bits_of(load_float(row) * splat(scale)) >> 16;
    return low | (bits_of(load_float(next) * splat(scale)) & 0xffff0000u);
}

// Asks for what will be packed soon: short pieces of rows far apart are more than the hardware's prefetchers follow.
template <typename Source>
inline void prefetch_rows(const Source* base, const RowTable& rows, int64_t begin, int64_t count, int64_t columns) {
    for (int64_t row = begin; row < begin + count && row < rows.count; ++row)
        for (int64_t column = 0; column < columns; column += 64 / static_cast<int64_t>(sizeof(Source)))
            __builtin_prefetch(base + rows.offset[row] + column);
}

// Packs the whole panels among `columns` neighbouring columns, row by row: the source is read in the order of memory,
// which its prefetchers follow, and the panels stay in the cache. Returns how many columns that was.
template <int Width, typename Source, typename Packed>
inline int64_t pack_lines(const Source* base, const RowTable& rows, int64_t columns, float scale, Packed* panels,
                          int64_t panel_stride) {
    constexpr int64_t advance = kPairs<Packed> ? 2 : 1;
    constexpr int block = Width < kLanes ? kLanes : Width, part = Width < kLanes ? Width : kLanes;
    const int64_t whole = columns / block * block;
    const Source zeros[block] = {};
    for (int64_t row = 0; row < rows.count; row += advance, panels += Width) {
        const bool alone = row + advance > rows.count;
        const Source* line = base + rows.offset[row];
        const Source* next = alone ? zeros : base + rows.offset[row + advance - 1];
        Packed* panel = panels;
        prefetch_rows(base, rows, row + 8, advance, whole);
        for (int64_t column = 0; column < whole; column += block) {
            for (int m = 0; m < block; m += kLanes) {
                const vuint step = convert_step(line + m, next + m, scale, panel);
                for (int lane = 0; lane < kLanes; lane += part)
                    __builtin_memcpy(panel + (m + lane) / Width * panel_stride + (m + lane) % Width,
                                     reinterpret_cast<const char*>(&step) + lane * 4, part * 4);
            }
            line += block;
            next += alone ? 0 : block;
            panel += block / Width * panel_stride;
        }
    }
    return whole;
}

template <int Width, typename Source, typename Packed>
inline void pack_columns_of(const GradientOperand& operand, int64_t channel_group, const RowTable& rows, int64_t first,
                            int64_t end, float scale, Packed* panels, int64_t panel_stride) {
    const Source* const base =
        static_cast<const Source*>(operand.tensor.data) + channel_group * operand.channel_group_stride;
    if (!operand.padded && operand.column_strides[2] == 1 && operand.column_shape[2] >= end) {
        const int64_t packed = pack_lines<Width>(base + first, rows, end - first, scale, panels, panel_stride);
        first += packed;
        panels += packed / Width * panel_stride;
    }
    for (; first < end; first += Width, panels += panel_stride) {
        const int width = static_cast<int>(end - first < Width ? end - first : Width);
        PanelWriter<Width, Source> writer{operand, rows, base, scale, {}, 0, width};
        writer.run_count = list_columns(operand, first, width, writer.runs);
        if (writer.run_count == 1 || writer.run_count * 4 <= width)
            writer.by_rows(panels);
        else
            writer.by_columns(panels);
    }
}

// Packs columns first..end of the listed rows into panels of Width columns, `panel_stride` elements apart.
template <int Width, typename Packed>
inline void pack_operand(const GradientOperand& operand, int64_t channel_group, const RowTable& rows, int64_t first,
                         int64_t end, float scale, Packed* panels, int64_t panel_stride) {
    switch (operand.tensor.dtype) {
        case DType::bfloat16:
            return pack_columns_of<Width, bfloat16>(operand, channel_group, rows, first, end, scale, panels,
                                                    panel_stride);
        case DType::float16:
            return pack_columns_of<Width, float16>(operand, channel_group, rows, first, end, scale, panels,
                                                   panel_stride);
        default:
            return pack_columns_of<Width, float>(operand, channel_group, rows, first, end, scale, panels, panel_stride);
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
