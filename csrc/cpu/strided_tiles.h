// Matrix products straight from row-major operands in cache, for matrices too small to be worth packing panel by
// panel: C[m, n] (+)= sum over k of A[m, k] * B[k, n], with n in whole vectors. An element of A and B is one 32-bit
// word: a float32, or two bfloat16 that are neighbours along k (their sums are float32 all the same).
//
// Floor: two fused multiply-adds a cycle (Zen 5). The widest tile is 14 x 2 vectors in AVX-512: 28 of 32 registers
// accumulate, against 14 broadcasts and 2 loads a step.
#pragma once

#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

#if defined(__AVX512F__)
constexpr int kStripRows = 14;
#elif defined(__AVX2__)
constexpr int kStripRows = 6;
#else
constexpr int kStripRows = 4;
#endif
static_assert(kStripRows <= kLanes && kStripRows % 2 == 0, "one lane a row; bfloat16 rows come in pairs");

template <typename Word>
struct Matrix {
    Word* data;
    int64_t stride;  // words from row to row

    Word* row(int64_t i) const { return data + i * stride; }
    Matrix from(int64_t i) const { return {row(i), stride}; }
};

inline vuint splat(uint32_t x) { return x - vuint{}; }

inline vfloat multiply_add(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline vfloat multiply_add(vfloat sum, vuint a, vuint b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

namespace detail {

// A[m, k] is at a.row(m)[k], or at a.row(k)[m] where A is transposed.
template <bool kTransposed, int kRows, int kVectors, typename Word>
inline void strided_tile(int64_t depth, Matrix<const Word> a, Matrix<const Word> b, Matrix<float> c, bool accumulate) {
    vfloat sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVectors; ++v) sum[m][v] = accumulate ? load(c.row(m) + v * kLanes) : vfloat{};
    // Every third row has a pointer, its neighbours are one and two strides off: a pointer for each would spill.
    constexpr int kBases = kTransposed ? 1 : (kRows + 2) / 3;
    const Word* base[kBases];
#pragma GCC unroll 16
    for (int g = 0; g < kBases; ++g) base[g] = a.row(3 * g);
    for (int64_t k = 0; k < depth; ++k) {
        decltype(load(b.data)) row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) row[v] = load(b.data + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const auto factor = splat(kTransposed ? base[0][m] : base[m / 3 % kBases][m % 3 * a.stride]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[m][v] = multiply_add(sum[m][v], factor, row[v]);
        }
        b.data += b.stride;
#pragma GCC unroll 16
        for (int g = 0; g < kBases; ++g) base[g] += kTransposed ? a.stride : 1;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVectors; ++v) store(c.row(m) + v * kLanes, sum[m][v]);
}

template <bool kTransposed, int kVectors, typename Word, int kRows = kStripRows>
inline void tile_of_rows(int64_t rows, int64_t depth, Matrix<const Word> a, Matrix<const Word> b, Matrix<float> c,
                         bool accumulate) {
    if constexpr (kRows > 0) {
        if (rows == kRows) {
            strided_tile<kTransposed, kRows, kVectors>(depth, a, b, c, accumulate);
        } else {
            tile_of_rows<kTransposed, kVectors, Word, kRows - 1>(rows, depth, a, b, c, accumulate);
        }
    }
}

}  // namespace detail

// Cuts n rows into strips of at most kStripRows, as even as whole granules of rows allow.
struct Strips {
    int64_t rows, granule, count;

    Strips(int64_t n, int64_t rows_together)
        : rows(n),
          granule(rows_together),
          count(((n + granule - 1) / granule + kStripRows / granule - 1) / (kStripRows / granule)) {}

    int64_t start(int64_t strip) const {
        const int64_t row = (rows + granule - 1) / granule * strip / count * granule;
        return row < rows ? row : rows;
    }
};

// C is written, or added to where `accumulate`; `width` is a multiple of kLanes.
template <bool kTransposed, typename Word>
void multiply(int64_t rows, int64_t width, int64_t depth, Matrix<const Word> a, Matrix<const Word> b, Matrix<float> c,
              bool accumulate) {
    const Strips strips(rows, 1);
    for (int64_t n = 0; n < width; n += 2 * kLanes) {
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t m = strips.start(strip);
            const int64_t count = strips.start(strip + 1) - m;
            const Matrix<const Word> from{kTransposed ? a.data + m : a.row(m), a.stride};
            const Matrix<const Word> panel{b.data + n, b.stride};
            const Matrix<float> to{c.row(m) + n, c.stride};
            if (n + kLanes < width) {
                detail::tile_of_rows<kTransposed, 2>(count, depth, from, panel, to, accumulate);
            } else {
                detail::tile_of_rows<kTransposed, 1>(count, depth, from, panel, to, accumulate);
            }
        }
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
