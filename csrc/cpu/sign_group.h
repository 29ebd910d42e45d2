// A group of neighbouring values of one sample: four vectors of float32, whatever they are stored as; their signs are
// or-ed into slices of words that are as wide as a stored value, so that values and slices fill vectors alike.
#pragma once

#include "activation_functions.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

constexpr int kGroup = 4 * kLanes;

typedef uint16_t vshort __attribute__((vector_size(4 * kLanes)));  // twice the lanes of vfloat
typedef vshort vshort_unaligned __attribute__((aligned(2), may_alias));

inline vshort load_short(const uint16_t* p) { return *reinterpret_cast<const vshort_unaligned*>(p); }
inline void store_short(uint16_t* p, vshort x) { *reinterpret_cast<vshort_unaligned*>(p) = x; }

// The slice of a word that goes with a type of value, and the bits of +inf, beyond which lie NaN and negative values.
template <class T>
struct Stored {
    using Slice = uint16_t;
};
template <>
struct Stored<float> {
    using Slice = uint32_t;
};
constexpr uint16_t infinity(const bfloat16*) { return 0x7f80; }
constexpr uint16_t infinity(const float16*) { return 0x7c00; }

// Two 16-bit values share a lane of 32 bits; each half becomes a float32.
inline vfloat low_float(const bfloat16*, vuint pair) { return float_of(pair << 16); }
inline vfloat high_float(const bfloat16*, vuint pair) { return float_of(pair & 0xffff0000u); }
inline vfloat low_float(const float16*, vuint pair) { return float16_to_float(pair & 0xffffu); }
inline vfloat high_float(const float16*, vuint pair) { return float16_to_float(pair >> 16); }

// The two float32 rounded to 16 bits, one above the other. A NaN that came of a bfloat16 has zeros in its low half, so
// that rounding cannot carry it into a number, and needs no case of its own.
inline vuint pair_of(const bfloat16*, vfloat low, vfloat high) {
    const vuint low_sum = bits_of(low) + 0x7fffu + ((bits_of(low) >> 16) & 1u);
    const vuint high_sum = bits_of(high) + 0x7fffu + ((bits_of(high) >> 16) & 1u);
    return low_sum >> 16 | (high_sum & 0xffff0000u);
}
inline vuint pair_of(const float16*, vfloat low, vfloat high) {
    return round_to_float16(low) | round_to_float16(high) << 16;
}

template <Activation kActivation>
inline void pack_group(const float* in, float* out, uint32_t* slices, uint32_t bit) {
    Quad x = {load(in), load(in + kLanes), load(in + 2 * kLanes), load(in + 3 * kLanes)};
    if (kActivation != Activation::none) {
        x = activate<kActivation>(x);
        store(out, x.a);
        store(out + kLanes, x.b);
        store(out + 2 * kLanes, x.c);
        store(out + 3 * kLanes, x.d);
    }
    const vfloat parts[] = {x.a, x.b, x.c, x.d};
    for (int i = 0; i < 4; ++i) {
        uint32_t* slice = slices + i * kLanes;
        // Bits of positive values are those of 1 to +inf: no floating point, whose flush-to-zero mode has no positive
        // subnormals.
        const vuint positive = reinterpret_cast<vuint>(bits_of(parts[i]) - 1u < vuint{} + 0x7f800000u);
        store(slice, load(slice) | (positive & (vuint{} + bit)));
    }
}

template <Activation kActivation, class T>
inline void pack_group(const T* in, T* out, uint16_t* slices, uint16_t bit) {
    vshort first = load_short(&in->bits);
    vshort second = load_short(&in->bits + 2 * kLanes);
    if (kActivation != Activation::none) {
        const vuint pairs[] = {reinterpret_cast<vuint>(first), reinterpret_cast<vuint>(second)};
        const Quad x = activate<kActivation>(
            {low_float(in, pairs[0]), high_float(in, pairs[0]), low_float(in, pairs[1]), high_float(in, pairs[1])});
        first = reinterpret_cast<vshort>(pair_of(in, x.a, x.b));
        second = reinterpret_cast<vshort>(pair_of(in, x.c, x.d));
        store_short(&out->bits, first);
        store_short(&out->bits + 2 * kLanes, second);
    }
    const vshort parts[] = {first, second};
    for (int i = 0; i < 2; ++i) {
        uint16_t* slice = slices + i * 2 * kLanes;
        const vshort positive = reinterpret_cast<vshort>(parts[i] - 1 < vshort{} + infinity(in));
        store_short(slice, load_short(slice) | (positive & (vshort{} + bit)));
    }
}

}  // namespace
}  // namespace LSWAG_ISA
}  // namespace lswag
