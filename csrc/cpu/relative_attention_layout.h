// Sizes, workspace and operand layouts of relative_attention. One (sample, head) is the unit of work; all its matrices
// stay in the second-level cache.
#pragma once

#include "lane_math.h"
#include "lswag/relative_attention.h"
#include "strided_tiles.h"

namespace lswag {
namespace LSWAG_ISA {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kPad = 16;  // floats in the widest vector

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements in a word: one float32, or two bfloat16.
template <typename Word>
constexpr int64_t kPack = 1;
template <>
constexpr int64_t kPack<uint32_t> = 2;

template <typename Word>
constexpr int64_t words(int64_t n) {
    return (n + kPack<Word> - 1) / kPack<Word>;
}

// Words from row to row of packed tokens: whole vectors, which transposing reads.
template <typename Word>
constexpr int64_t packed_width(int64_t width) {
    return (words<Word>(width) + kPad - 1) / kPad * kPad;
}

template <typename Word>
inline Matrix<const Word> read_only(Matrix<Word> m) {
    return {m.data, m.stride};
}

// Hands out pieces of a workspace, or only counts their bytes where there is none yet.
class Arena {
 public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(int64_t count) {
        T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
    template <typename T>
    Matrix<T> take(int64_t rows, int64_t stride) {
        return {take<T>(rows * stride), stride};
    }
    int64_t used() const { return used_; }

 private:
    char* base_;
    int64_t used_ = 0;
};

struct Shape {
    int64_t samples, tokens, heads, head_dim, rows, columns;
    int64_t width;         // of a row over the channels of a head
    int64_t score_width;   // of a row over keys
    int64_t score_stride;  // the same, with room for a vector that starts at the last key

    explicit Shape(const RelativeAttention& call)
        : samples(call.qkv.shape[0]),
          tokens(call.qkv.shape[1]),
          heads(call.heads),
          head_dim(call.qkv.shape[2] / (3 * call.heads)),
          rows(call.rows),
          columns(call.columns),
          width(padded(head_dim)),
          score_width(padded(tokens)),
          score_stride(score_width + kPad) {}

    int64_t units() const { return samples * heads; }
};

// One direction of the grid: the `count` queries at one of its places are `step` tokens apart, from first(place).
struct Direction {
    int64_t places, count, step, place_step;

    int64_t first(int64_t place) const { return 1 + place * place_step; }
    int64_t slice(int64_t place) const { return places - 1 - place; }
};

inline Direction direction_of(const Shape& s, int which) {
    return which == 0 ? Direction{s.rows, s.columns, 1, s.columns} : Direction{s.columns, s.rows, s.columns, 1};
}

// `count` elements as float32, zeros from there to `width`.
inline void read_row(const Tensor& source, int64_t offset, int64_t count, int64_t width, float* row) {
    const auto copy = [&](const auto* from) {
        int64_t d = 0;
        for (; d + kLanes <= count; d += kLanes) store(row + d, load_float(from + d));
        for (; d < count; ++d) row[d] = to_float(from[d]);
        for (; d < width; ++d) row[d] = 0;
    };
    if (source.dtype == DType::bfloat16) {
        copy(source.as<const bfloat16>() + offset);
    } else if (source.dtype == DType::float16) {
        copy(source.as<const float16>() + offset);
    } else {
        copy(source.as<const float>() + offset);
    }
}

// The nearest float16 (ties to even), subnormals and infinities included; NaN stays NaN.
inline uint16_t round_to_float16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (bits >= 0x38800000u)
        return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // the sum's last bit is worth 2^-24, float16's smallest number
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
}

// Writes `count` elements times `factor` in the dtype of `target`.
inline void write_row(const float* row, float factor, int64_t count, const Tensor& target, int64_t offset) {
    int64_t d = 0;
    if (target.dtype == DType::bfloat16) {
        bfloat16* to = target.as<bfloat16>() + offset;
        for (; d + kLanes <= count; d += kLanes) store_bfloat16(to + d, load(row + d) * splat(factor));
        for (; d < count; ++d) to[d].bits = round_to_bfloat16(row[d] * factor);
    } else if (target.dtype == DType::float16) {
        for (; d < count; ++d) target.as<uint16_t>()[offset + d] = round_to_float16(row[d] * factor);
    } else {
        float* to = target.as<float>() + offset;
        for (; d + kLanes <= count; d += kLanes) store(to + d, load(row + d) * splat(factor));
        for (; d < count; ++d) to[d] = row[d] * factor;
    }
}

inline void add_row(const float* row, float factor, int64_t width, float* to) {
    for (int64_t d = 0; d < width; d += kLanes) store(to + d, load(to + d) + load(row + d) * splat(factor));
}

inline float dot_row(const float* a, const float* b, int64_t width) {
    vfloat sum = {};
    for (int64_t d = 0; d < width; d += kLanes) sum += load(a + d) * load(b + d);
    return sum_lanes(sum);
}

// Rounds a row of `width` floats into words.
inline void pack_row(const float* row, int64_t width, float* packed) {
    for (int64_t d = 0; d < width; d += kLanes) store(packed + d, load(row + d));
}
inline void pack_row(const float* row, int64_t width, uint32_t* packed) {
    bfloat16* halves = reinterpret_cast<bfloat16*>(packed);
    for (int64_t d = 0; d < width; d += kLanes) {
#if defined(__AVX512BF16__)
        store(&halves[d].bits, (vhalf)_mm512_cvtneps_pbh((__m512)load(row + d)));
#else
        store_bfloat16(halves + d, load(row + d));
#endif
    }
}

// The words of two rows, element by element: what a product over rows reads.
inline void interleave_rows(const float* first, const float* second, int64_t width, uint32_t* pairs) {
    for (int64_t d = 0; d < width; d += kLanes) {
#if defined(__AVX512BF16__)
        const vuint low = __builtin_convertvector((vhalf)_mm512_cvtneps_pbh((__m512)load(first + d)), vuint);
        const vuint high = __builtin_convertvector((vhalf)_mm512_cvtneps_pbh((__m512)load(second + d)), vuint);
#else
        const vuint low = round_to_bfloat16(load(first + d));
        const vuint high = round_to_bfloat16(load(second + d));
#endif
        store(pairs + d, low | high << 16);
    }
}

// to.row(k)[m] = from.row(m)[k], in words, with zeros from `rows` to `width`.
template <typename Word>
void transpose(Matrix<const Word> from, int64_t rows, int64_t columns, int64_t width, Matrix<Word> to) {
    for (int64_t m = 0; m < width; m += kLanes) {
        for (int64_t k = 0; k < columns; k += kLanes) {
            vfloat square[kLanes];
            for (int64_t i = 0; i < kLanes; ++i)
                square[i] = m + i < rows ? load(reinterpret_cast<const float*>(from.row(m + i) + k)) : vfloat{};
            transpose_rows(square);
            for (int64_t i = 0; i < smaller(kLanes, columns - k); ++i)
                store(reinterpret_cast<float*>(to.row(k + i) + m), square[i]);
        }
    }
}

// Tokens [T, D] of one head: `source` from `offset` on, rows `stride` elements apart.
struct Tokens {
    const Tensor& source;
    int64_t offset, stride;

    // The tokens of (sample, head) number `unit` in part `part` of `parts` side by side.
    Tokens(const Shape& s, const Tensor& tensor, int64_t unit, int64_t part, int64_t parts)
        : source(tensor), stride(parts * s.heads * s.head_dim) {
        offset = unit / s.heads * s.tokens * stride + (part * s.heads + unit % s.heads) * s.head_dim;
    }
    int64_t row(int64_t i) const { return offset + i * stride; }
};

// Brings rows of tokens into the second-level cache. Rows of other heads lie between those of one, which hides them
// from the processor's own prefetching; so a unit fetches the rows of the next one while it multiplies. Inlined by
// force: GCC takes a function that only prefetches for one without effect, and drops its calls.
__attribute__((always_inline)) inline void prefetch_rows(const Shape& s, const Tokens& tokens, int64_t first,
                                                         int64_t count) {
    const int64_t size = item_size(tokens.source.dtype);
    for (int64_t i = first; i < first + count; ++i) {
        const char* row = tokens.source.as<const char>() + tokens.row(i) * size;
        for (int64_t byte = 0; byte < s.head_dim * size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
}

// The tokens in words, row by row; `of_class` is added to the first where it is given.
inline void pack_tokens(const Shape& s, const Tokens& tokens, const float* of_class, Matrix<float> packed) {
    for (int64_t i = 0; i < s.tokens; ++i) {
        read_row(tokens.source, tokens.row(i), s.head_dim, s.width, packed.row(i));
    }
    if (of_class != nullptr) add_row(of_class, 1, s.width, packed.data);
}
inline void pack_tokens(const Shape& s, const Tokens& tokens, const float* of_class, Matrix<uint32_t> packed) {
    for (int64_t i = 0; i < s.tokens; ++i) {
        const uint16_t* from = tokens.source.as<const uint16_t>() + tokens.row(i);
        uint16_t* to = reinterpret_cast<uint16_t*>(packed.row(i));
        int64_t d = 0;
        for (; d + kLanes <= s.head_dim; d += kLanes) store(to + d, load(from + d));
        for (; d < s.head_dim; ++d) to[d] = from[d];
        for (; d < s.width; ++d) to[d] = 0;
    }
    if (of_class == nullptr) return;
    bfloat16* first = reinterpret_cast<bfloat16*>(packed.data);
    for (int64_t d = 0; d < s.width; d += kLanes) store_bfloat16(first + d, load_float(first + d) + load(of_class + d));
}

// Packed tokens as right operands of a product over tokens. Of float32 they are as they stand.
inline Matrix<const float> over_tokens(const Shape&, Matrix<const float> packed, Matrix<float>) { return packed; }
inline Matrix<const uint32_t> over_tokens(const Shape& s, Matrix<const uint32_t> packed, Matrix<uint32_t> pairs) {
    for (int64_t i = 0; i < s.tokens; i += 2) {
        const uint16_t* low = reinterpret_cast<const uint16_t*>(packed.row(i));
        const uint16_t* high = reinterpret_cast<const uint16_t*>(packed.row(i + 1));
        const bool alone = i + 1 == s.tokens;
        for (int64_t d = 0; d < s.width; d += kLanes) {
            const vuint first = __builtin_convertvector(load(low + d), vuint);
            const vuint second = alone ? vuint{} : __builtin_convertvector(load(high + d), vuint);
            store(pairs.row(i / 2) + d, first | second << 16);
        }
    }
    return read_only(pairs);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
