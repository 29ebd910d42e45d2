// Packs the signs of activations across samples, with the activation function in the same pass where it is wanted.
//
// A block is some thousand positions. The samples are streamed over it, each or-ing its bit into slices of words that
// stay in the L1 cache: memory sees every value once, and a word once for every slice of 32 samples (16, where values
// have 16 bits).
#include "lswag/activation_patterns.h"

#include "position_order.h"
#include "sign_group.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // positions: 8 or 16 KB of slices
constexpr int64_t kMaxRows = 64;
constexpr int64_t kStage = 8 * kGroup;

// Equally long parts of some rows. Those of one row start at starts[row], and their slices at row * pitch.
struct Block {
    int64_t rows;
    int64_t length;
    int64_t pitch;
    Axis run;
    Axis starts[kMaxRows];
};

int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

template <Activation kActivation, class T, class Slice>
void pack_run(const T* in, T* out, Slice* slices, Slice bit, int64_t n) {
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) pack_group<kActivation>(in + i, out + i, slices + i, bit);
    if (i == n) return;
    T values[kGroup] = {};
    __builtin_memcpy(values, in + i, (n - i) * sizeof(T));
    pack_group<kActivation>(values, values, slices + i, bit);
    if (kActivation != Activation::none) __builtin_memcpy(out + i, values, (n - i) * sizeof(T));
}

// The same for values that do not lie next to one another.
template <Activation kActivation, class T, class Slice>
void pack_strided_run(const T* in, int64_t in_stride, T* out, int64_t out_stride, Slice* slices, Slice bit, int64_t n) {
    T values[kStage];
    for (int64_t first = 0; first < n; first += kStage) {
        const int64_t count = min(kStage, n - first);
        for (int64_t i = 0; i < count; ++i) values[i] = in[(first + i) * in_stride];
        pack_run<kActivation>(values, values, slices + first, bit, count);
        if (kActivation == Activation::none) continue;
        for (int64_t i = 0; i < count; ++i) out[(first + i) * out_stride] = values[i];
    }
}

template <Activation kActivation, class T, class Slice>
void pack_sample(const SignPacking& task, const Block& block, int64_t sample, Slice bit, Slice* slices) {
    const T* in = static_cast<const T*>(task.pre.data) + sample * task.pre.strides[0];
    T* out =
        kActivation == Activation::none ? nullptr : static_cast<T*>(task.post.data) + sample * task.post.strides[0];
    for (int64_t r = 0; r < block.rows; ++r) {
        const T* row = in + block.starts[r].pre;
        T* written = kActivation == Activation::none ? nullptr : out + block.starts[r].post;
        Slice* row_slices = slices + r * block.pitch;
        if (block.run.pre == 1 && block.run.post == 1)
            pack_run<kActivation>(row, written, row_slices, bit, block.length);
        else
            pack_strided_run<kActivation>(row, block.run.pre, written, block.run.post, row_slices, bit, block.length);
    }
}

// Puts slices into the words that they are part of; the lowest slice starts a word.
template <class Slice>
void write_slices(const SignPacking& task, const Block& block, int64_t first_bit, const Slice* slices) {
    uint64_t* words = task.words + first_bit / 64 * task.positions;
    const int shift = first_bit % 64;
    const uint64_t kept = task.accumulate || shift != 0 ? ~uint64_t{0} : 0;
    for (int64_t r = 0; r < block.rows; ++r) {
        uint64_t* row = words + block.starts[r].word;
        const Slice* from = slices + r * block.pitch;
        const int64_t stride = block.run.word;
        if (stride == 1)
            for (int64_t i = 0; i < block.length; ++i) row[i] = (row[i] & kept) | uint64_t{from[i]} << shift;
        else
            for (int64_t i = 0; i < block.length; ++i)
                row[i * stride] = (row[i * stride] & kept) | uint64_t{from[i]} << shift;
    }
}

template <Activation kActivation, class T>
void pack_block(const SignPacking& task, const Block& block) {
    using Slice = typename Stored<T>::Slice;
    constexpr int64_t kBits = 8 * sizeof(Slice);
    alignas(64) Slice slices[kBlock];
    const int64_t end = task.first_sample + task.packed_samples;
    int64_t sample = 0;
    for (int64_t first_bit = task.first_sample / kBits * kBits; first_bit < end; first_bit += kBits) {
        __builtin_memset(slices, 0, block.rows * block.pitch * sizeof(Slice));
        for (; sample < min(first_bit + kBits, end) - task.first_sample; ++sample) {
            const Slice bit = static_cast<Slice>(1u << (task.first_sample + sample) % kBits);
            pack_sample<kActivation, T>(task, block, sample, bit, slices);
        }
        write_slices(task, block, first_bit, slices);
    }
    if (kActivation == Activation::none) return;
    for (; sample < task.pre.shape[0]; ++sample) pack_sample<kActivation, T>(task, block, sample, Slice{0}, slices);
}

template <Activation kActivation, class T>
void pack(const SignPacking& task) {
    const PositionOrder order = position_order(task.pre, task.post);
    const int64_t length = min(order.run.size, kBlock);
    const int64_t pitch = (length + kGroup - 1) / kGroup * kGroup;
    const int64_t parts = (order.run.size + length - 1) / length;
    const int64_t rows = parts > 1 ? 1 : min(kMaxRows, kBlock / pitch);
    const int64_t blocks = (order.rows + rows - 1) / rows * parts;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b % parts * length;
        const int64_t row = b / parts * rows;
        Block block;
        block.run = order.run;
        block.pitch = pitch;
        block.rows = min(rows, order.rows - row);
        block.length = min(length, order.run.size - first);
        for (int64_t r = 0; r < block.rows; ++r) {
            block.starts[r] = order.row_start(row + r);
            block.starts[r].pre += first * order.run.pre;
            block.starts[r].post += first * order.run.post;
            block.starts[r].word += first * order.run.word;
        }
        pack_block<kActivation, T>(task, block);
    }
}

template <class T>
void pack_typed(const SignPacking& task) {
    switch (task.activation) {
        case Activation::none:
            return pack<Activation::none, T>(task);
        case Activation::relu:
            return pack<Activation::relu, T>(task);
        case Activation::relu6:
            return pack<Activation::relu6, T>(task);
        case Activation::gelu:
            return pack<Activation::gelu, T>(task);
        case Activation::gelu_tanh:
            return pack<Activation::gelu_tanh, T>(task);
        case Activation::silu:
            return pack<Activation::silu, T>(task);
        case Activation::hardswish:
            return pack<Activation::hardswish, T>(task);
    }
}

}  // namespace

void pack_signs(const SignPacking& task) {
    if (task.positions == 0) return;
    if (task.pre.dtype == DType::float32) return pack_typed<float>(task);
    if (task.pre.dtype == DType::bfloat16) return pack_typed<bfloat16>(task);
    pack_typed<float16>(task);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
