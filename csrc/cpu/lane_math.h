// Vector mathematics beyond arithmetic: transposes, reductions of many vectors at once, powers of two.
#pragma once

#include <utility>

#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

namespace detail {

template <int kChunk, int kOdd>
constexpr int source_lane(int lane) {
    const int chunk = lane / kChunk;
    return (chunk / 2 * 2 + kOdd) * kChunk + lane % kChunk + (chunk % 2) * kLanes;
}

template <int kChunk, int kOdd, int... lane>
inline vfloat pick(vfloat a, vfloat b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, source_lane<kChunk, kOdd>(lane)...);
}

}  // namespace detail

// The even (kOdd = 0) or odd chunks of a, each followed by the chunk of b at the same place.
template <int kChunk, int kOdd>
inline vfloat pick(vfloat a, vfloat b) {
    return detail::pick<kChunk, kOdd>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Lane i of the result is the sum of the lanes of rows[i]. The rows are overwritten.
template <int kChunk = 1>
inline vfloat sum_rows(vfloat (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / kChunk / 2; ++i) {
        const vfloat a = rows[2 * i], b = rows[2 * i + 1];
        rows[i] = pick<kChunk, 0>(a, b) + pick<kChunk, 1>(a, b);
    }
    if constexpr (2 * kChunk < kLanes) return sum_rows<2 * kChunk>(rows);
    return rows[0];
}

// Lane i of the result is the largest lane of rows[i]. The rows are overwritten.
template <int kChunk = 1>
inline vfloat max_rows(vfloat (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / kChunk / 2; ++i) {
        const vfloat a = rows[2 * i], b = rows[2 * i + 1];
        rows[i] = max(pick<kChunk, 0>(a, b), pick<kChunk, 1>(a, b));
    }
    if constexpr (2 * kChunk < kLanes) return max_rows<2 * kChunk>(rows);
    return rows[0];
}

// Transposes a square of kLanes rows.
template <int kChunk = 1>
inline void transpose_rows(vfloat (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if ((i & kChunk) != 0) continue;
        const vfloat a = rows[i], b = rows[i + kChunk];
        rows[i] = pick<kChunk, 0>(a, b);
        rows[i + kChunk] = pick<kChunk, 1>(a, b);
    }
    if constexpr (2 * kChunk < kLanes) transpose_rows<2 * kChunk>(rows);
}

// 2^x for x below 128, to 1.2e-7 of it (the Chebyshev fit of degree 6 within half a unit of 0); 0 below 2^-126. A NaN
// stays one, whatever its payload, bits of which would move into the exponent.
inline vfloat exp2(vfloat x) {
    const vfloat shifter = splat(0x1.8p23f);
    const vfloat moved = x + shifter;
    const vfloat f = x - (moved - shifter);
    vfloat y = splat(1.54697320e-4f);
    y = y * f + splat(1.34004322e-3f);
    y = y * f + splat(9.61802560e-3f);
    y = y * f + splat(5.55032721e-2f);
    y = y * f + splat(2.40226512e-1f);
    y = y * f + splat(6.93147207e-1f);
    y = y * f + splat(1.0f);
    const vfloat power = float_of(bits_of(y) + (bits_of(moved) << 23));
    const vfloat number = x == x ? power : x;
    return x < splat(-126.0f) ? vfloat{} : number;
}

}  // namespace LSWAG_ISA
}  // namespace lswag
