// Activation patterns: the signs of activations packed across samples into words, and what is counted over them.
//
// The words of one activation are [W, P]: P positions, W = ceil(S / 64) words each. Bit n % 64 of word n / 64 is 1
// where the value of sample n is > 0. Positions are in the row-major order of the activation's shape, whatever its
// strides.
#pragma once

#include <cstdint>

#include "lswag/dispatch.h"
#include "lswag/tensor.h"

namespace lswag {

enum class Activation : int32_t { none, relu, relu6, gelu, gelu_tanh, silu, hardswish };
constexpr int kActivationCount = 7;

struct SignPacking {
    Tensor pre;   // [S, ...]; with Activation::none the values whose signs are packed
    Tensor post;  // as pre, written; without data where the activation is none. May be pre itself.
    Activation activation;
    uint64_t* words;
    int64_t positions;
    int64_t first_sample;    // the bit of sample 0 of pre
    int64_t packed_samples;  // how many of pre's samples give bits, from its first
    bool accumulate;         // or into the words instead of writing them
    int threads;
};

// The words of several activations.
struct PatternSet {
    const uint64_t* const* words;
    const int64_t* positions;
    int64_t activations;
    int64_t samples;  // S: bits at S and beyond are ignored
};

// The patterns of each activation grouped into 2^bits partitions, by their hash.
struct PatternPartition {
    PatternSet set;
    int bits;
    uint64_t* patterns;   // out: [sum of positions, W], one activation after the other
    int64_t* ends;        // out: [activations, 2^bits], where each partition ends, from the activation's first pattern
    int64_t* histograms;  // workspace [threads, 2^bits]
    int threads;
};

// Counting by a tag for each of the 2^(S - bits) patterns of a partition, for S where those stay in the L1 cache. Here
// the partition is part of a pattern's value, so only the other S - bits (at most 16) are kept of it.
struct TagCount {
    PatternPartition partition;  // its patterns are uint16
    uint16_t* tags;              // workspace [threads, 2^(S - bits)]
    int64_t* counts;             // workspace [threads, activations + 1]
    int64_t* by_activation;      // out: the distinct patterns of each activation
    int64_t* of_all;             // out: the distinct patterns of all together
};

// Counting the distinct patterns of each partition in a hash set that grows from kFirstSlots with what it holds. A set
// of c slots lies at slots c to 2 c of the workspace, and is at most 3/4 full.
constexpr int64_t kFirstSlots = 4096;
struct PartitionCount {
    PatternPartition partition;
    int64_t slots;           // of a thread: twice a power of two that holds the largest partition at 3/4 full
    uint64_t* keys;          // workspace [threads, slots, W]
    int32_t* tags;           // workspace [threads, slots]
    int64_t* counts;         // workspace [threads, 2, activations + 1]
    int64_t* by_activation;  // out
    int64_t* of_all;         // out
};

// The samples' agreements: out[i, j] is the number of positions at which samples i and j have the same bit.
constexpr int64_t kCodeWords = 16;  // a thread transposes 64 * kCodeWords positions at a time
struct AgreementCount {
    PatternSet set;
    uint64_t* codes;         // workspace [threads, 64 W, kCodeWords]
    int64_t* disagreements;  // workspace [threads, S, S]
    int64_t* agreements;     // out [S, S]
    int threads;
};

LSWAG_KERNEL(pack_signs, const SignPacking& task)
LSWAG_KERNEL(count_by_tags, const TagCount& task)
LSWAG_KERNEL(partition_patterns, const PatternPartition& task)
LSWAG_KERNEL(count_partitions, const PartitionCount& task)
LSWAG_KERNEL(count_agreements, const AgreementCount& task)

}  // namespace lswag
