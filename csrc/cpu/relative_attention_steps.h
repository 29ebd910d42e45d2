// The steps that the forward and the backward pass of relative_attention share.
//
// Tables are read extended: entry n - 1 + delta for every delta from -(n - 1) to n - 1 of a direction with n places, so
// that clipping is done once, and what a query at place p needs for the n places of its keys is n rows in sequence from
// n - 1 - p. All queries at one place share that slice, which makes each step n small matrix products.
//
// The class token needs no slices. r[i, 0] is one vector for every query i, so it is added to the first key and the
// first value; and r[0, j] is that vector again for every key j, a constant of the first query.
#pragma once

#include "relative_attention_layout.h"

namespace lswag {
namespace LSWAG_ISA {

// The row of a table with `reach` places on either side that entry t of an extended one repeats.
inline int64_t table_row(int64_t t, int64_t places, int64_t reach) {
    const int64_t delta = t - (places - 1);
    return reach + 1 + (delta < -reach ? -reach : smaller(delta, reach));
}

// A vertical and a horizontal table, extended.
template <typename Word>
struct Tables {
    float* of_class;          // [width]
    Matrix<float> rows[2];    // [2 * places, width], the last row zero
    Matrix<Word> packed[2];   // the rows in words
    Matrix<Word> columns[2];  // the packed rows transposed: [words(width), 2 * places and a vector]
    Matrix<Word> pairs[2];    // row t holds rows t and t + 1, element by element; none for float32

    Tables(const Shape& s, Arena& arena) : of_class(arena.take<float>(s.width)) {
        for (int which = 0; which < 2; ++which) {
            const int64_t places = direction_of(s, which).places;
            rows[which] = arena.take<float>(2 * places, s.width);
            packed[which] = arena.take<Word>(2 * places, packed_width<Word>(s.width));
            columns[which] = arena.take<Word>(words<Word>(s.width), padded(2 * places) + padded(places));
            pairs[which] = arena.take<Word>(kPack<Word> == 1 ? 0 : 2 * places, s.width);
        }
    }

    void fill(const Shape& s, const Tensor* source) {
        read_row(source[0], 0, s.head_dim, s.width, of_class);
        read_row(source[1], 0, s.head_dim, s.width, rows[0].data);
        add_row(rows[0].data, 1, s.width, of_class);
        for (int which = 0; which < 2; ++which) extend(s, source[which], which);
    }

    // The operand of a product over places from the slice of a place on.
    Matrix<const Word> over_places(int which, int64_t slice) const {
        if constexpr (kPack<Word> == 1) return {rows[which].row(slice), rows[which].stride};
        if constexpr (kPack<Word> == 2) return {pairs[which].row(slice), 2 * pairs[which].stride};
    }

 private:
    void extend(const Shape& s, const Tensor& source, int which) {
        const int64_t places = direction_of(s, which).places;
        const Matrix<float> to = rows[which];
        for (int64_t t = 0; t < 2 * places - 1; ++t) {
            const int64_t row = table_row(t, places, source.shape[0] / 2 - 1);
            read_row(source, row * s.head_dim, s.head_dim, s.width, to.row(t));
        }
        read_row(source, 0, 0, s.width, to.row(2 * places - 1));
        for (int64_t t = 0; t < 2 * places; ++t) pack_row(to.row(t), s.width, packed[which].row(t));
        transpose(read_only(packed[which]), 2 * places, words<Word>(s.width), columns[which].stride, columns[which]);
        if constexpr (kPack<Word> == 2)
            for (int64_t t = 0; t < 2 * places - 1; ++t)
                interleave_rows(to.row(t), to.row(t + 1), s.width, pairs[which].row(t));
    }
};

// One number for each query and each row, or column, of the grid: [T, padded(places)]; the class token's row is unused.
struct Places {
    Matrix<float> of[2];

    Places(const Shape& s, Arena& arena) {
        for (int which = 0; which < 2; ++which)
            of[which] = arena.take<float>(s.tokens, padded(direction_of(s, which).places));
    }
};

// places[i, p] = x_i . the extended row that key place p has for query i.
template <typename Word>
void dot_tables(const Shape& s, Matrix<const Word> x, const Tables<Word>& tables, Places& places) {
    for (int which = 0; which < 2; ++which) {
        const Direction d = direction_of(s, which);
        const Matrix<const Word> columns = read_only(tables.columns[which]);
        const Matrix<float> to = places.of[which];
        for (int64_t place = 0; place < d.places; ++place)
            multiply<false>(d.count, padded(d.places), words<Word>(s.head_dim),
                            Matrix<const Word>{x.row(d.first(place)), x.stride * d.step},
                            Matrix<const Word>{columns.data + d.slice(place), columns.stride},
                            Matrix<float>{to.row(d.first(place)), to.stride * d.step}, false);
    }
}

// to_i += sum over p of places[i, p] * the extended row that key place p has for query i. `packed` is scratch.
template <typename Word>
void add_tables(const Shape& s, const Places& places, const Tables<Word>& tables, Matrix<Word> packed,
                Matrix<float> to) {
    for (int which = 0; which < 2; ++which) {
        const Direction d = direction_of(s, which);
        const Matrix<float> sums = places.of[which];
        for (int64_t i = 1; i < s.tokens; ++i) pack_row(sums.row(i), sums.stride, packed.row(i));
        for (int64_t place = 0; place < d.places; ++place)
            multiply<false>(d.count, s.width, words<Word>(d.places),
                            Matrix<const Word>{packed.row(d.first(place)), packed.stride * d.step},
                            tables.over_places(which, d.slice(place)),
                            Matrix<float>{to.row(d.first(place)), to.stride * d.step}, true);
    }
}

// The scores of query i before the product of queries and keys: what the tables add, and `outside` beyond the keys.
inline void start_row(const Shape& s, int64_t i, const Places& places, float of_class, float outside, float* row) {
    row[0] = 0;
    if (i == 0) {
        for (int64_t j = 1; j < s.tokens; j += kLanes) store(row + j, splat(of_class));
    } else {
        const float* by_row = places.of[0].row(i);
        const float* by_column = places.of[1].row(i);
        float* to = row + 1;
        for (int64_t r = 0; r < s.rows; ++r, to += s.columns)
            for (int64_t c = 0; c < s.columns; c += kLanes) store(to + c, load(by_column + c) + splat(by_row[r]));
    }
    for (int64_t j = s.tokens; j < s.score_width; j += kLanes) store(row + j, splat(outside));
}

// All bits of the first `count` lanes.
inline vuint first_lanes(int64_t count) {
    vint lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return reinterpret_cast<vuint>(lane < vint{} + static_cast<int32_t>(smaller(count, kLanes)));
}

// The sums over each row and each column of the key grid of one query's `row` over keys.
inline void sum_places(const Shape& s, const float* row, float* by_row, float* by_column) {
    for (int64_t c = 0; c < padded(s.columns); c += kLanes) store(by_column + c, vfloat{});
    for (int64_t r = 0; r < padded(s.rows); r += kLanes) {
        const int64_t count = smaller(kLanes, s.rows - r);
        vfloat row_sums[kLanes] = {};
        for (int64_t c = 0; c < s.columns; c += kLanes) {
            const float* grid = row + 1 + r * s.columns + c;
            const vuint inside = first_lanes(s.columns - c);
            vfloat column_sums = load(by_column + c);
            for (int64_t i = 0; i < count; ++i, grid += s.columns) {
                const vfloat x = float_of(bits_of(load(grid)) & inside);
                row_sums[i] += x;
                column_sums += x;
            }
            store(by_column + c, column_sums);
        }
        store(by_row + r, sum_rows(row_sums));
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
