// Counts, for every two samples, the positions at which their bits agree: words are transposed into one code a sample,
// 64 positions a word, and codes are compared by population counts.
#include "lswag/activation_patterns.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {
namespace {

int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

int64_t thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Transposes 64 x 64 bits: bit i of word j becomes bit j of word i (Hacker's Delight, 7-3).
void transpose(uint64_t* x) {
    uint64_t mask = 0x00000000ffffffffu;
    for (int64_t step = 32; step != 0; step /= 2, mask ^= mask << step) {
        for (int64_t j = 0; j < 64; j = ((j | step) + 1) & ~step) {
            const uint64_t swapped = ((x[j] >> step) ^ x[j | step]) & mask;
            x[j] ^= swapped << step;
            x[j | step] ^= swapped;
        }
    }
}

// Adds the disagreements over up to 64 * kCodeWords positions from `first`.
void count_chunk(const PatternSet& set, int64_t activation, int64_t first, uint64_t* codes, int64_t* disagreements) {
    const int64_t positions = set.positions[activation];
    const int64_t code_words = min(kCodeWords, (positions - first + 63) / 64);
    for (int64_t w = 0; w < (set.samples + 63) / 64; ++w) {
        for (int64_t c = 0; c < code_words; ++c) {
            const int64_t from = first + 64 * c;
            const uint64_t* words = set.words[activation] + w * positions + from;
            uint64_t square[64] = {};
            for (int64_t i = 0; i < min(64, positions - from); ++i) square[i] = words[i];
            transpose(square);
            for (int64_t n = 0; n < 64; ++n) codes[(64 * w + n) * kCodeWords + c] = square[n];
        }
    }
    for (int64_t i = 0; i < set.samples; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            int64_t count = 0;
            for (int64_t c = 0; c < code_words; ++c)
                count += __builtin_popcountll(codes[i * kCodeWords + c] ^ codes[j * kCodeWords + c]);
            disagreements[i * set.samples + j] += count;
        }
    }
}

}  // namespace

void count_agreements(const AgreementCount& task) {
    const int64_t samples = task.set.samples;
    const int64_t code_size = (samples + 63) / 64 * 64 * kCodeWords;
    const int64_t chunk = 64 * kCodeWords;
    int64_t positions = 0;
    for (int64_t i = 0; i < task.threads * samples * samples; ++i) task.disagreements[i] = 0;
    for (int64_t a = 0; a < task.set.activations; ++a) {
        positions += task.set.positions[a];
        const int64_t chunks = (task.set.positions[a] + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (chunks > 1)
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t thread = thread_number();
            count_chunk(task.set, a, c * chunk, task.codes + thread * code_size,
                        task.disagreements + thread * samples * samples);
        }
    }
    for (int64_t i = 0; i < samples; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            int64_t disagreements = 0;
            for (int64_t t = 0; t < task.threads; ++t)
                disagreements += task.disagreements[(t * samples + i) * samples + j];
            task.agreements[i * samples + j] = task.agreements[j * samples + i] = positions - disagreements;
        }
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
