// Packing of gradient operands into the panels of the micro-kernel, converted and scaled by a power of two on the way.
//
// Panels hold step after step of k: float32, one row a step, or (from bfloat16 operands only) pairs of bfloat16, two.
#pragma once

#include "gradient_operand.h"
#include "microkernel.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

// Whether a step of k in a packed panel is a pair of rows, and what one row gives to it.
template <typename Packed>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<uint32_t> = true;
template <typename Packed>
struct PanelElement {
    using Type = float;
};
template <>
struct PanelElement<uint32_t> {
    using Type = uint16_t;
};

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

// Packs one panel of columns that are no neighbours in memory, or lie in a padded plane.
template <int Width, typename Source>
struct PanelWriter {
    const GradientOperand& operand;
    const RowTable& rows;
    const Source* base;  // of the channel group
    float scale;
    ColumnRun runs[Width];
    int run_count;

    template <typename Element>
    void fetch_row(int64_t row, Element* line) const {
        for (int m = 0; m < Width; ++m) line[m] = 0;
        // Pieces of lines far apart: their latency is all there is to this, and no hardware prefetcher sees them
        // coming.
        const int64_t ahead = row + 16 < rows.count ? row + 16 : row;
        for (int r = 0; r < run_count; ++r) __builtin_prefetch(base + rows.offset[ahead] + runs[r].offset);
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

    // Square blocks, as many steps as lanes: each column is read along its rows, and the block transposed.
    template <typename Packed>
    void by_columns(Packed* panel) const {
        constexpr int64_t advance = kPairs<Packed> ? 2 : 1;
        constexpr int part = Width < kLanes ? Width : kLanes;
        ColumnRun columns[Width];
        const int width = list_single_columns(columns);
        for (int64_t row = 0; row < rows.count; row += advance * kLanes, panel += kLanes * Width) {
            const int64_t left = (rows.count - row + advance - 1) / advance, steps = left < kLanes ? left : kLanes;
            const bool along = neighbours(row, advance * kLanes);
            for (int first = 0; first < Width; first += part) {
                vuint block[kLanes] = {};
                for (int m = 0; m < part && first + m < width; ++m)
                    block[m] = along && readable(columns[first + m], row, advance * kLanes)
                                   ? read_along(columns[first + m], row, panel)
                                   : read_apart(columns[first + m], row, panel);
                transpose(block);
                for (int64_t step = 0; step < steps; ++step)
                    __builtin_memcpy(panel + step * Width + first, &block[step], part * 4);
            }
        }
    }

 private:
    int list_single_columns(ColumnRun* columns) const {
        int count = 0;
        for (int r = 0; r < run_count; ++r) {
            for (int i = 0; i < runs[r].length; ++i) {
                columns[count] = runs[r];
                columns[count++].offset += i;
            }
        }
        return count;
    }

    bool neighbours(int64_t row, int64_t count) const {
        if (row + count > rows.count) return false;
        bool along = true;
        for (int64_t i = 1; i < count; ++i) along = along && rows.offset[row + i] == rows.offset[row] + i;
        return along;
    }

    // Rows outside a padded plane may be read, and be cleared then, but only within the tensor's memory.
    bool readable(const ColumnRun& column, int64_t row, int64_t count) const {
        if (!operand.padded) return true;
        int64_t extent = 1;
        for (int d = 0; d < operand.tensor.ndim; ++d)
            extent += (operand.tensor.shape[d] - 1) * operand.tensor.strides[d];
        const int64_t begin = base - static_cast<const Source*>(operand.tensor.data) + rows.offset[row] + column.offset;
        return begin >= 0 && begin + count <= extent;
    }

    vuint inside_mask(const ColumnRun& column, int64_t row) const {
        const vuint y = load(reinterpret_cast<const uint32_t*>(rows.y + row)) + static_cast<uint32_t>(column.y);
        const vuint x = load(reinterpret_cast<const uint32_t*>(rows.x + row)) + static_cast<uint32_t>(column.x);
        return reinterpret_cast<vuint>((y < static_cast<uint32_t>(operand.axes[0].size)) &
                                       (x < static_cast<uint32_t>(operand.axes[1].size)));
    }

    vuint read_along(const ColumnRun& column, int64_t row, const float*) const {
        const Source* const source = base + rows.offset[row] + column.offset;
        __builtin_prefetch(source + 2 * kLanes);
        const vuint values = bits_of(load_float(source) * splat(scale));
        return operand.padded ? values & inside_mask(column, row) : values;
    }

    vuint read_along(const ColumnRun& column, int64_t row, const uint32_t*) const {
        vuint pairs;
        __builtin_memcpy(&pairs, base + rows.offset[row] + column.offset, sizeof(pairs));
        pairs = (bits_of(float_of(pairs << 16) * splat(scale)) >> 16) |
                (bits_of(float_of(pairs & 0xffff0000u) * splat(scale)) & 0xffff0000u);
        if (!operand.padded) return pairs;
        const vhalf mask[2] = {__builtin_convertvector(inside_mask(column, row), vhalf),
                               __builtin_convertvector(inside_mask(column, row + kLanes), vhalf)};
        vuint both;
        __builtin_memcpy(&both, mask, sizeof(both));
        return pairs & both;
    }

    template <typename Packed>
    vuint read_apart(const ColumnRun& column, int64_t row, const Packed*) const {
        using Element = typename PanelElement<Packed>::Type;
        constexpr int64_t count = sizeof(vuint) / sizeof(Element);
        Element line[count] = {};
        const Source* const source = base + column.offset;
        for (int64_t i = 0; i < count && row + i < rows.count; ++i)
            if (inside(operand, rows, row + i, column)) convert(source[rows.offset[row + i]], scale, line + i);
        vuint values;
        __builtin_memcpy(&values, line, sizeof(values));
        return values;
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
        PanelWriter<Width, Source> writer{operand, rows, base, scale, {}, 0};
        writer.run_count = list_columns(operand, first, width, writer.runs);
        if (writer.run_count == 1 || writer.run_count * 4 <= width)
            writer.by_rows(panels);
        else
            writer.by_columns(panels);
    }
}

// Packs columns first..end of the listed rows into panels of Width columns, `panel_stride` elements apart.
template <int Width>
inline void pack_operand(const GradientOperand& operand, int64_t channel_group, const RowTable& rows, int64_t first,
                         int64_t end, float scale, float* panels, int64_t panel_stride) {
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
template <int Width>
inline void pack_operand(const GradientOperand& operand, int64_t channel_group, const RowTable& rows, int64_t first,
                         int64_t end, float scale, uint32_t* panels, int64_t panel_stride) {
    pack_columns_of<Width, bfloat16>(operand, channel_group, rows, first, end, scale, panels, panel_stride);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
