// Vectors of the instruction set that a kernel is compiled for, written with the vector extensions of GCC and Clang so
// that one source serves SSE2, NEON, AVX2 and AVX-512. Included only by csrc/cpu/*.cpp; all of it lives in the
// namespace of the instruction set, so that no code for a wider one is ever linked into a narrower path.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace lswag {
namespace LSWAG_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));
typedef float vfloat_half __attribute__((vector_size(2 * kLanes)));  // half the lanes of vfloat
typedef double vdouble __attribute__((vector_size(4 * kLanes)));     // as many lanes as vfloat_half, one register
typedef int64_t vlong __attribute__((vector_size(4 * kLanes)));      // what comparing vdouble gives

// The 16-bit formats, told apart by type.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

namespace detail {
typedef vfloat vfloat_unaligned __attribute__((aligned(4), may_alias));
typedef vuint vuint_unaligned __attribute__((aligned(4), may_alias));
typedef vhalf vhalf_unaligned __attribute__((aligned(2), may_alias));
typedef vdouble vdouble_unaligned __attribute__((aligned(8), may_alias));
}  // namespace detail

inline vfloat splat(float x) { return x - vfloat{}; }
inline vdouble splat(double x) { return x - vdouble{}; }

inline vfloat load(const float* p) { return *reinterpret_cast<const detail::vfloat_unaligned*>(p); }
inline vdouble load(const double* p) { return *reinterpret_cast<const detail::vdouble_unaligned*>(p); }
inline vuint load(const uint32_t* p) { return *reinterpret_cast<const detail::vuint_unaligned*>(p); }
inline vhalf load(const uint16_t* p) { return *reinterpret_cast<const detail::vhalf_unaligned*>(p); }

inline void store(float* p, vfloat x) { *reinterpret_cast<detail::vfloat_unaligned*>(p) = x; }
inline void store(double* p, vdouble x) { *reinterpret_cast<detail::vdouble_unaligned*>(p) = x; }
inline void store(uint32_t* p, vuint x) { *reinterpret_cast<detail::vuint_unaligned*>(p) = x; }
inline void store(uint16_t* p, vhalf x) { *reinterpret_cast<detail::vhalf_unaligned*>(p) = x; }

inline vuint bits_of(vfloat x) { return reinterpret_cast<vuint>(x); }
inline vfloat float_of(vuint x) { return reinterpret_cast<vfloat>(x); }

inline vfloat abs(vfloat x) { return float_of(bits_of(x) & 0x7fffffffu); }
inline vfloat max(vfloat x, vfloat y) { return x > y ? x : y; }

// The lower (half = 0) or upper (half = 1) lanes in float64.
inline vdouble widen(vfloat x, int half) {
    vfloat_half lanes;
    __builtin_memcpy(&lanes, reinterpret_cast<const char*>(&x) + half * sizeof(lanes), sizeof(lanes));
    return __builtin_convertvector(lanes, vdouble);
}

// As many values as vdouble has lanes, in float64.
inline vdouble load_double(const double* p) { return load(p); }
inline vdouble load_double(const float* p) {
    vfloat_half lanes;
    __builtin_memcpy(&lanes, p, sizeof(lanes));
    return __builtin_convertvector(lanes, vdouble);
}

// float32 from float32, bfloat16 and float16, exactly (subnormals, infinities and NaN included).
inline vfloat load_float(const float* p) { return load(p); }
inline vfloat load_float(const bfloat16* p) { return float_of(__builtin_convertvector(load(&p->bits), vuint) << 16); }
inline vfloat float16_to_float(vuint half) {  // in the low half of each lane
    const vuint magnitude = (half & 0x7fffu) << 13;
    const vuint special = reinterpret_cast<vuint>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    const vfloat rebased = float_of(magnitude) * splat(0x1p112f);
    return float_of(bits_of(rebased) | special | ((half & 0x8000u) << 16));
}
inline vfloat load_float(const float16* p) { return float16_to_float(__builtin_convertvector(load(&p->bits), vuint)); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(float16 x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits |= (magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u) | ((x.bits & 0x8000u) << 16);
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// The bits of the nearest bfloat16 (ties to even) in the low half of each lane; NaN stays NaN.
inline vuint round_to_bfloat16(vfloat x) {
    const vuint bits = bits_of(x);
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint nan = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}
inline void store_bfloat16(bfloat16* p, vfloat x) {
    store(&p->bits, __builtin_convertvector(round_to_bfloat16(x), vhalf));
}
inline uint16_t round_to_bfloat16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The bits of the nearest float16 (ties to even) in the low half of each lane; NaN stays NaN.
inline vuint round_to_float16(vfloat x) {
    const vuint magnitude = bits_of(x) & 0x7fffffffu;
    const vuint sign = (bits_of(x) >> 16) & 0x8000u;
    const vuint normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal float16 where that of a float32 is.
    const vuint subnormal = bits_of(float_of(magnitude) + splat(0.5f)) - 0x3f000000u;
    const vuint beyond = magnitude > 0x7f800000u ? vuint{} + 0x7e00u : vuint{} + 0x7c00u;
    const vuint finite = magnitude < 0x38800000u ? subnormal : normal;
    return sign | (magnitude >= 0x47800000u ? beyond : finite);
}

// The lower halves (upper = 0) or upper halves (upper = kLanes / 2) of two vectors, lane by lane in turn.
template <int upper>
inline vuint interleave(vuint a, vuint b) {
#if defined(__clang__) || __GNUC__ >= 12
    constexpr int u = upper, n = kLanes + upper;
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, u, n, u + 1, n + 1, u + 2, n + 2, u + 3, n + 3, u + 4, n + 4, u + 5, n + 5,
                                   u + 6, n + 6, u + 7, n + 7);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, u, n, u + 1, n + 1, u + 2, n + 2, u + 3, n + 3);
#else
    return __builtin_shufflevector(a, b, u, n, u + 1, n + 1);
#endif
#else
    vuint both;
    for (int lane = 0; lane < kLanes; ++lane) both[lane] = (lane % 2 ? b : a)[upper + lane / 2];
    return both;
#endif
}

// Transposes a square of kLanes x kLanes.
inline void transpose(vuint (&rows)[kLanes]) {
    for (int width = 1; width < kLanes; width *= 2) {
        vuint mixed[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            mixed[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2]);
            mixed[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2]);
        }
        for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
    }
}

// Sums in a fixed order, so that results do not depend on how lanes are folded.
inline float sum_lanes(vfloat x) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
    return total;
}
inline double sum_lanes(vdouble x) {
    double total = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) total += x[lane];
    return total;
}

}  // namespace LSWAG_ISA
}  // namespace lswag
