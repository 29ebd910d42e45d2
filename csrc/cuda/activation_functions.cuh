// The activation functions in float32, and 32-bit words of stored values: one float32, or two values of 16 bits.
//
// NaN stays NaN; at -inf GELU and SiLU give their limit 0. The functions are those of csrc/cpu/activation_functions.h,
// with the hardware's 2^x and reciprocal in place of polynomials: about 20 instructions a value for GELU, the longest,
// which a GPU of 4 TB/s hides behind 4 bytes of traffic a value.
#pragma once

#include <cstdint>
#include <cstring>

#include "lswag/activation_patterns.h"
#include "lswag/host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cmath>
#endif

namespace lswag {
namespace cuda {

// The types of stored values, by how many lie in a word of 32 bits.
struct Float32 {
    static constexpr int kBytes = 4;
};
struct BFloat16 {
    static constexpr int kBytes = 2;
};
struct Float16 {
    static constexpr int kBytes = 2;
};

LSWAG_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

LSWAG_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDACC__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
#endif
}

LSWAG_DEVICE float exp2_of(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

LSWAG_DEVICE float quotient(float x, float y) {
#if defined(__CUDACC__)
    return __fdividef(x, y);
#else
    return x / y;
#endif
}

LSWAG_DEVICE float multiply_add(float x, float y, float z) {
#if defined(__CUDACC__)
    return fmaf(x, y, z);
#else
    return x * y + z;
#endif
}

// Not fmaxf, which loses NaN.
LSWAG_DEVICE float relu_of(float x) { return x < 0.0f ? 0.0f : x; }
LSWAG_DEVICE float at_most_six(float x) { return x > 6.0f ? 6.0f : x; }

// gelu(x) = max(x, 0) - t * Phi(-t) with t = |x|. log2 Phi(-t) is a polynomial, the CPU's, that fits on [0, 6]; beyond,
// it falls faster than log2 Phi(-t) need be known, as t * Phi(-t) < 6e-9, and t stops at 6, so that nothing is infinity
// times 0 and no branch is needed. The maximum loses NaN; the polynomial brings it back.
LSWAG_DEVICE float gelu_of(float x) {
    constexpr float kLog2Phi[] = {-1.82235719e-8f, 5.84371519e-7f,  -8.00000922e-6f, 5.90544280e-5f,
                                  -2.19516268e-4f, -1.24707969e-4f, 7.09833815e-3f,  -5.25420873e-2f,
                                  -4.59188584e-1f, -1.15110793f,    -9.99999936e-1f};
    const float t = fabsf(x);
    float log2_phi = kLog2Phi[0];
    LSWAG_UNROLL
    for (int i = 1; i < 11; ++i) log2_phi = multiply_add(log2_phi, t, kLog2Phi[i]);
    return multiply_add(-fminf(t, 6.0f), exp2_of(log2_phi), fmaxf(x, 0.0f));
}

// x * sigmoid(z).
LSWAG_DEVICE float gated(float x, float z) { return z < -88.0f ? 0.0f : quotient(x, 1.0f + exp2_of(z * -1.44269504f)); }

template <Activation kActivation>
LSWAG_DEVICE float activate(float x) {
    if constexpr (kActivation == Activation::relu) return relu_of(x);
    if constexpr (kActivation == Activation::relu6) return at_most_six(relu_of(x));
    if constexpr (kActivation == Activation::gelu) return gelu_of(x);
    if constexpr (kActivation == Activation::gelu_tanh)
        return gated(x, 1.59576912f * multiply_add(0.044715f * (x * x), x, x));
    if constexpr (kActivation == Activation::silu) return gated(x, x);
    if constexpr (kActivation == Activation::hardswish) return x * at_most_six(relu_of(x + 3.0f)) * 0.166666667f;
    return x;
}

template <Activation kActivation>
LSWAG_DEVICE uint32_t activate_word(Float32, uint32_t word) {
    return bits_of(activate<kActivation>(float_of(word)));
}

template <Activation kActivation>
LSWAG_DEVICE uint32_t activate_word(BFloat16, uint32_t word) {
    const float low = activate<kActivation>(float_of(word << 16));
    const float high = activate<kActivation>(float_of(word & 0xffff0000u));
#if defined(__CUDACC__)
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    // A NaN that came of a bfloat16 has zeros in its low half, so that rounding cannot carry it into a number.
    const uint32_t low_sum = bits_of(low) + 0x7fffu + ((bits_of(low) >> 16) & 1u);
    const uint32_t high_sum = bits_of(high) + 0x7fffu + ((bits_of(high) >> 16) & 1u);
    return low_sum >> 16 | (high_sum & 0xffff0000u);
#endif
}

// All bits of each value that is > 0.
LSWAG_DEVICE uint32_t positive(Float32, uint32_t word) { return float_of(word) > 0.0f ? 0xffffffffu : 0u; }

LSWAG_DEVICE uint32_t positive(BFloat16, uint32_t word) {
#if defined(__CUDACC__)
    return __hgt2_mask(*reinterpret_cast<const __nv_bfloat162*>(&word), __floats2bfloat162_rn(0.0f, 0.0f));
#else
    return (float_of(word << 16) > 0.0f ? 0xffffu : 0u) | (float_of(word & 0xffff0000u) > 0.0f ? 0xffff0000u : 0u);
#endif
}

#if defined(__CUDACC__)
template <Activation kActivation>
LSWAG_DEVICE uint32_t activate_word(Float16, uint32_t word) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    const __half2 rounded = __floats2half2_rn(activate<kActivation>(pair.x), activate<kActivation>(pair.y));
    return *reinterpret_cast<const uint32_t*>(&rounded);
}

LSWAG_DEVICE uint32_t positive(Float16, uint32_t word) {
    return __hgt2_mask(*reinterpret_cast<const __half2*>(&word), __floats2half2_rn(0.0f, 0.0f));
}
#endif

}  // namespace cuda
}  // namespace lswag
