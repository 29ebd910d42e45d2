// An activation function over pre [S, ...] with the signs of its values packed across samples, in one pass.
//
// A warp takes 32 * kRun positions and the eight samples of one byte of a word: eight independent loads of up to
// 16 bytes a lane are in flight before the first is used. The bytes of a word meet in shared memory; a word is written
// by one thread. Positions are taken in the order in which they lie in memory, whatever the order of the axes.
//
// Floor: S * P * (bytes read + written a value) + 8 * W * P bytes at the rate of a copy; GELU's ~20 instructions a
// value are 0.7 of what an H200 issues meanwhile for 16-bit values, the others' less. AutoFormer-Tiny's widest layer (S
// = 64, P = 197 * 1024, bfloat16): 53 MB, 12 us at 4.3 TB/s.
#pragma once

#include "activation_functions.cuh"
#include "block.cuh"
#include "lswag/activation_patterns.h"
#include "position_order.h"

namespace lswag {
namespace cuda {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / 32;

struct PackTask {
    const char* pre;
    char* post;  // null where nothing is written; may be pre
    uint64_t* words;
    int64_t pre_stride;  // of the sample axes, in elements
    int64_t post_stride;
    LSWAG_ISA::PositionOrder order;
    int64_t positions;
    int64_t first_sample;
    int64_t samples;  // that are read
    int64_t packed_samples;
    int octets;       // the bytes of a word that a block fills: 1, 2, 4 or 8
    int first_octet;  // the first of them, in word 0 of the launch
    int first_word;   // the word of the launch's row 0
    int word_rows;    // the rows of the launch
    bool accumulate;
};

// Words of 32 bits; with fewer than 4 bytes, the lower ones of a word.
template <int kBytes>
struct alignas(kBytes) Run {
    static constexpr int kWords = kBytes / 4;
    uint32_t words[kWords];
    LSWAG_DEVICE void load(const char* from) { *this = *reinterpret_cast<const Run*>(from); }
    LSWAG_DEVICE void store(char* to) const { *reinterpret_cast<Run*>(to) = *this; }
};
template <>
struct Run<2> {
    static constexpr int kWords = 1;
    uint32_t words[1];
    LSWAG_DEVICE void load(const char* from) { words[0] = *reinterpret_cast<const uint16_t*>(from); }
    LSWAG_DEVICE void store(char* to) const { *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]); }
};

template <int kRun>
struct PackShared {
    uint8_t bytes[kPackWarps][kRun][32];
};

template <int kRun>
LSWAG_DEVICE int64_t first_position(const PackTask& task, int64_t tile) {
    return tile * (kPackWarps / task.octets) * 32 * kRun;
}

// Where a position lies; the axis' fields are offsets.
LSWAG_DEVICE LSWAG_ISA::Axis locate(const PackTask& task, int64_t position) {
    LSWAG_ISA::Axis at = {};
    if (task.order.outer_axes > 0) {
        const int64_t row = position / task.order.run.size;
        position -= row * task.order.run.size;
        at = task.order.row_start(row);
    }
    at.pre += position * task.order.run.pre;
    at.post += position * task.order.run.post;
    at.word += position * task.order.run.word;
    return at;
}

// The bits of kRun positions from `position` for eight samples, written to every 32nd of `bytes`.
template <Activation kActivation, class T, int kRun>
LSWAG_DEVICE void pack_octet(const PackTask& task, int64_t position, int64_t first_sample, uint8_t* bytes) {
    constexpr int kPerWord = T::kBytes == 4 || kRun == 1 ? 1 : 2;
    using Values = Run<kRun * T::kBytes>;
    const LSWAG_ISA::Axis at = locate(task, position);
    Values values[8];
    LSWAG_UNROLL
    for (int k = 0; k < 8; ++k) {
        const int64_t sample = first_sample + k;
        if (sample >= 0 && sample < task.samples)
            values[k].load(task.pre + (at.pre + sample * task.pre_stride) * T::kBytes);
    }
    uint32_t flags[Values::kWords] = {};
    LSWAG_UNROLL
    for (int k = 0; k < 8; ++k) {
        const int64_t sample = first_sample + k;
        if (sample < 0 || sample >= task.samples) continue;
        LSWAG_UNROLL
        for (int i = 0; i < Values::kWords; ++i) {
            if (kActivation != Activation::none)
                values[k].words[i] = activate_word<kActivation>(T{}, values[k].words[i]);
            const uint32_t bit = sample < task.packed_samples ? 1u << k : 0u;
            flags[i] |= positive(T{}, values[k].words[i]) & (kPerWord == 2 ? bit * 0x10001u : bit);
        }
        if (kActivation != Activation::none)
            values[k].store(task.post + (at.post + sample * task.post_stride) * T::kBytes);
    }
    LSWAG_UNROLL
    for (int j = 0; j < kRun; ++j) bytes[32 * j] = static_cast<uint8_t>(flags[j / kPerWord] >> 16 * (j % kPerWord));
}

template <int kRun>
LSWAG_DEVICE void write_word(const PackTask& task, int64_t word, int64_t position, int local,
                             const PackShared<kRun>& shared) {
    const int tile = local / (32 * kRun), lane = local / kRun % 32, j = local % kRun;
    uint64_t bits = 0;
    for (int o = 0; o < task.octets; ++o)
        bits |= uint64_t{shared.bytes[tile * task.octets + o][j][lane]} << 8 * (task.first_octet + o);
    uint64_t* to = task.words + word * task.positions + locate(task, position).word;
    *to = task.accumulate ? *to | bits : bits;
}

template <Activation kActivation, class T, int kRun, class Block>
LSWAG_DEVICE void pack_tile(const Block& block, const PackTask& task, int64_t tile, int64_t row,
                            PackShared<kRun>& shared) {
    const int64_t word = task.first_word + row;
    const int64_t first = first_position<kRun>(task, tile);
    for (int i = block.thread; i < kPackThreads; i += block.threads) {
        const int warp = i / 32, lane = i % 32;
        const int64_t position = first + (static_cast<int64_t>(warp / task.octets) * 32 + lane) * kRun;
        if (position >= task.positions) continue;
        const int64_t octet = word * 8 + task.first_octet + warp % task.octets;
        pack_octet<kActivation, T, kRun>(task, position, octet * 8 - task.first_sample, &shared.bytes[warp][0][lane]);
    }
    if (word * 64 >= task.first_sample + task.packed_samples) return;
    block.sync();
    for (int i = block.thread; i < kPackWarps / task.octets * 32 * kRun; i += block.threads)
        if (first + i < task.positions) write_word<kRun>(task, word, first + i, i, shared);
}

}  // namespace cuda
}  // namespace lswag
