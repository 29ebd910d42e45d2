// The inner matrix product of the kernels: C[m, n] (+)= sum over k of A[k, m] * B[k, n] on one tile of
// kTileRows x kTileColumns held in registers, from panels laid out k by k.
//
// Floor: kTileRows * kTileColumns / kLanes fused multiply-adds a step of k at two a cycle (Zen 5: 8 x 48 in
// AVX-512, 24 of 32 registers accumulate), against kTileRows broadcasts + kTileColumns / kLanes loads.
#pragma once

#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
constexpr int kTileColumns = 3 * kLanes;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTileColumns = 3 * kLanes;
#else
constexpr int kTileRows = 4;
constexpr int kTileColumns = 2 * kLanes;
#endif
constexpr int kTileVectors = kTileColumns / kLanes;

namespace detail {

template <int Vectors>
inline void start_tile(vfloat (&sum)[kTileRows][Vectors], const float* c, int64_t ldc, bool accumulate) {
    for (int m = 0; m < kTileRows; ++m)
        for (int v = 0; v < Vectors; ++v) sum[m][v] = accumulate ? load(c + m * ldc + v * kLanes) : vfloat{};
}

template <int Vectors>
inline void store_tile(const vfloat (&sum)[kTileRows][Vectors], float* c, int64_t ldc) {
    for (int m = 0; m < kTileRows; ++m)
        for (int v = 0; v < kTileVectors; ++v) store(c + m * ldc + v * kLanes, v < Vectors ? sum[m][v] : vfloat{});
}

}  // namespace detail

// a [k, kTileRows], b [k, kTileColumns], c [kTileRows, kTileColumns] with rows ldc apart; C is added to where
// `accumulate`, else overwritten. The whole tile is read and written: pad the panels with zeros. Where only the first
// Vectors vectors of columns hold anything, the rest of the tile is not computed, and becomes zero.
template <int Vectors = kTileVectors>
inline void multiply_tile(int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool accumulate) {
    vfloat sum[kTileRows][Vectors];
    detail::start_tile(sum, c, ldc, accumulate);
    for (int64_t step = 0; step < k; ++step, a += kTileRows, b += kTileColumns) {
        vfloat row[Vectors];
        for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kTileRows; ++m) {
            const vfloat factor = splat(a[m]);
            for (int v = 0; v < Vectors; ++v) sum[m][v] += factor * row[v];
        }
    }
    detail::store_tile(sum, c, ldc);
}

// The same with products (exact) and sums in float64, half the columns at a time: half the rate. A half without any of
// the `filled` columns becomes zero.
inline void multiply_tile(int64_t k, const float* a, const float* b, double* c, int64_t ldc, bool accumulate,
                          int64_t filled) {
    constexpr int lanes = kLanes / 2;
    for (int column = 0; column < kTileColumns; column += kTileColumns / 2, c += kTileColumns / 2) {
        if (column >= filled) {
            for (int m = 0; m < kTileRows; ++m) __builtin_memset(c + m * ldc, 0, kTileColumns / 2 * sizeof(double));
            continue;
        }
        vdouble sum[kTileRows][kTileVectors];
        for (int m = 0; m < kTileRows; ++m)
            for (int v = 0; v < kTileVectors; ++v) sum[m][v] = accumulate ? load(c + m * ldc + v * lanes) : vdouble{};
        for (int64_t step = 0; step < k; ++step) {
            vdouble row[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) row[v] = load_double(b + step * kTileColumns + column + v * lanes);
#pragma GCC unroll 16
            for (int m = 0; m < kTileRows; ++m) {
                const vdouble factor = splat(static_cast<double>(a[step * kTileRows + m]));
                for (int v = 0; v < kTileVectors; ++v) sum[m][v] += factor * row[v];
            }
        }
        for (int m = 0; m < kTileRows; ++m)
            for (int v = 0; v < kTileVectors; ++v) store(c + m * ldc + v * lanes, sum[m][v]);
    }
}

#if defined(__AVX512BF16__)
// The same from bfloat16 panels of k pairs: a [pairs, kTileRows, 2], b [pairs, kTileColumns, 2]. Products are exact
// and sums float32; the instruction takes subnormals, in and out, as zero, so scale the operands well above them.
template <int Vectors = kTileVectors>
inline void multiply_tile(int64_t pairs, const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, bool accumulate) {
    vfloat sum[kTileRows][Vectors];
    detail::start_tile(sum, c, ldc, accumulate);
    for (int64_t step = 0; step < pairs; ++step, a += kTileRows, b += kTileColumns) {
        vuint row[Vectors];
        for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kTileRows; ++m) {
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[m]));
            for (int v = 0; v < Vectors; ++v)
                sum[m][v] = (vfloat)_mm512_dpbf16_ps((__m512)sum[m][v], factor, (__m512bh)row[v]);
        }
    }
    detail::store_tile(sum, c, ldc);
}
#endif

}  // namespace LSWAG_ISA
}  // namespace lswag
