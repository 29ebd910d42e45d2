// The exact power of two that an operand is multiplied by, so that products neither underflow nor overflow.
#pragma once

#include "lswag/tensor.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

// The largest scaled magnitude is in [2^40, 2^41): products of two operands then reach 2^82, which leaves 2^45 for
// sums of products, and a product that is 2^-206 of the largest one still has full precision. What is below 2^-166 of
// the largest magnitude of its operand becomes subnormal where that is scaled down, and there loses bits or, in
// bfloat16 instructions, all of them; in no sum over samples does it matter beside the largest.
constexpr int kScaledExponent = 40;

inline uint32_t magnitude_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}
inline uint32_t magnitude_bits(bfloat16 x) { return (x.bits & 0x7fffu) << 16; }
inline uint32_t magnitude_bits(float16 x) { return x.bits & 0x7fffu; }

constexpr uint32_t kInfinityBits = 0x7f800000u;

inline int highest_bit(uint32_t bits) { return 31 - __builtin_clz(bits); }

// The bits of the float32 of the same value as a float16 that is not negative. Integers only here and in
// scale_exponent: a processor told to take subnormals as zero must find the same scale.
inline uint32_t float_bits_of_float16(uint32_t half) {
    if (half >= 0x7c00u) return kInfinityBits | (half & 0x3ffu) << 13;
    if (half >= 0x400u || half == 0) return half == 0 ? 0 : (half << 13) + (112u << 23);
    const int top = highest_bit(half);  // of a subnormal: half * 2^-24
    return static_cast<uint32_t>(top - 24 + 127) << 23 | (half << (23 - top) & 0x7fffffu);
}

template <typename Source>
inline uint32_t largest_in_line(const Source* p, int64_t count, int64_t stride) {
    uint32_t largest = 0;
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = magnitude_bits(p[i]);
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = magnitude_bits(p[i * stride]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// The dimensions of a tensor in the order of memory, neighbours merged: few long lines.
struct Lines {
    int ndim = 0;
    int64_t shape[kMaxDims + 1];
    int64_t strides[kMaxDims + 1];

    explicit Lines(const Tensor& tensor) {
        for (int d = 0; d < tensor.ndim; ++d) insert(tensor.shape[d], tensor.strides[d]);
        if (ndim == 0) insert_at(0, 1, 1);
        int kept = 0;
        for (int d = 1; d < ndim; ++d) {
            if (strides[kept] == strides[d] * shape[d]) {
                shape[kept] *= shape[d];
                strides[kept] = strides[d];
            } else {
                ++kept;
                shape[kept] = shape[d];
                strides[kept] = strides[d];
            }
        }
        ndim = kept + 1;
    }

    int64_t count() const {
        int64_t n = 1;
        for (int d = 0; d + 1 < ndim; ++d) n *= shape[d];
        return n;
    }

    int64_t offset(int64_t line) const {
        int64_t where = 0;
        for (int d = ndim - 2; d >= 0; --d) {
            where += line % shape[d] * strides[d];
            line /= shape[d];
        }
        return where;
    }

 private:
    void insert(int64_t size, int64_t stride) {
        if (size == 1 || stride == 0) return;
        int at = 0;
        while (at < ndim && strides[at] >= stride) ++at;
        insert_at(at, size, stride);
    }

    void insert_at(int at, int64_t size, int64_t stride) {
        for (int d = ndim; d > at; --d) {
            shape[d] = shape[d - 1];
            strides[d] = strides[d - 1];
        }
        shape[at] = size;
        strides[at] = stride;
        ++ndim;
    }
};

// The largest magnitude in one of `every` pieces of the tensor.
template <typename Source>
inline uint32_t largest_bits(const Tensor& tensor, int64_t every, int threads) {
    const Lines lines(tensor);
    const int64_t length = lines.shape[lines.ndim - 1], stride = lines.strides[lines.ndim - 1], piece = 1 << 12;
    const int64_t pieces = (length + piece - 1) / piece, jobs = lines.count() * pieces;
    const Source* const data = static_cast<const Source*>(tensor.data);
    uint32_t largest = 0;
#pragma omp parallel for num_threads(threads) reduction(max : largest) if (jobs > 256 * every)
    for (int64_t job = 0; job < jobs; job += every) {
        const int64_t begin = job % pieces * piece, count = length - begin < piece ? length - begin : piece;
        const uint32_t found = largest_in_line(data + lines.offset(job / pieces) + begin * stride, count, stride);
        largest = found > largest ? found : largest;
    }
    return largest;
}

// The float32 bits of the largest |x| of one of `every` pieces; of infinity or NaN where they hold one.
inline uint32_t largest_magnitude(const Tensor& tensor, int64_t every, int threads) {
    if (tensor.dtype == DType::float16) return float_bits_of_float16(largest_bits<float16>(tensor, every, threads));
    return tensor.dtype == DType::bfloat16 ? largest_bits<bfloat16>(tensor, every, threads)
                                           : largest_bits<float>(tensor, every, threads);
}

inline bool is_finite(double x) { return x - x == 0; }

// The exponent e of the scale 2^e for values of up to that with the bits `largest`; 0 where it is zero or not finite.
inline int scale_exponent(uint32_t largest) {
    if (largest == 0 || largest >= kInfinityBits) return 0;
    const int exponent = largest >> 23 != 0 ? static_cast<int>(largest >> 23) - 127 : highest_bit(largest) - 149;
    const int wanted = kScaledExponent - exponent;
    return wanted < 127 ? wanted : 127;
}

}  // namespace LSWAG_ISA
}  // namespace lswag
