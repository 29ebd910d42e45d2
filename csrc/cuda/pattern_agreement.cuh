// The agreements of every two samples: words are transposed into one code a sample, 64 positions a word, and codes are
// compared by population counts.
//
// A block compares 64 samples with 64 over some tiles of positions. A thread compares 4 x 4 samples over the 16 words
// of a tile in registers, so that 8 words read from shared memory serve 16 comparisons.
//
// Work: S^2 / 2 * P / 64 comparisons (two POPC each, 16 a cycle and multiprocessor). AutoFormer-Tiny (2.5 M positions):
// 40 us at S = 64 on 132 multiprocessors of 1.7 GHz, 11 ms at S = 1024; 20 MB of words a 64 samples would take 5 us.
#pragma once

#include "pattern_sources.cuh"

namespace lswag {
namespace cuda {

constexpr int kAgreementThreads = 256;
constexpr int kSquares = kTile / 64;

struct AgreementTask {
    Sources sources;
    int64_t tiles;
    int64_t* agreements;  // [S, S], holding the number of all positions
};

struct AgreementShared {
    uint64_t codes[2][kSquares][64];  // of the rows' samples and of the columns'
    int32_t disagreements[64][64];
};

// Transposes squares of 64 x 64 bits: bit i of word j becomes bit j of word i (Hacker's Delight, 7-3).
template <class Block>
LSWAG_DEVICE void transpose(const Block& block, uint64_t (*codes)[64]) {
    uint64_t mask = 0x00000000ffffffffu;
    for (int step = 32; step != 0; step /= 2, mask ^= mask << step) {
        block.sync();
        for (int k = block.thread; k < kSquares * 32; k += block.threads) {
            uint64_t* square = codes[k / 32];
            const int low = k % 32 & (step - 1);
            const int j = (k % 32 - low) * 2 + low;
            const uint64_t swapped = ((square[j] >> step) ^ square[j + step]) & mask;
            square[j] ^= swapped << step;
            square[j + step] ^= swapped;
        }
    }
}

// The codes of the 64 samples of a word.
template <class Block>
LSWAG_DEVICE void load_codes(const Block& block, const Sources& sources, const Source& source, int64_t first, int word,
                             uint64_t (*codes)[64]) {
    for (int i = block.thread; i < kTile; i += block.threads)
        codes[i / 64][i % 64] = first + i < source.positions ? sources.word(source, first + i, word) : 0;
    transpose(block, codes);
}

template <class Block>
LSWAG_DEVICE void compare_codes(const Block& block, const uint64_t (*rows)[64], const uint64_t (*columns)[64],
                                int32_t (*disagreements)[64]) {
    for (int k = block.thread; k < 256; k += block.threads) {
        const int i = k / 16, j = k % 16;
        int32_t counts[4][4] = {};
        for (int s = 0; s < kSquares; ++s) {
            LSWAG_UNROLL
            for (int y = 0; y < 4; ++y) {
                LSWAG_UNROLL
                for (int x = 0; x < 4; ++x) counts[y][x] += count_ones(rows[s][i + 16 * y] ^ columns[s][j + 16 * x]);
            }
        }
        LSWAG_UNROLL
        for (int y = 0; y < 4; ++y) {
            LSWAG_UNROLL
            for (int x = 0; x < 4; ++x) disagreements[i + 16 * y][j + 16 * x] += counts[y][x];
        }
    }
}

// Compares the samples of words `row` and `column` <= row over the tiles first, first + stride, ...
template <class Block>
LSWAG_DEVICE void count_agreements(const Block& block, const AgreementTask& task, int row, int column, int64_t first,
                                   int64_t stride, AgreementShared& shared) {
    const Sources& sources = task.sources;
    for (int i = block.thread; i < 64 * 64; i += block.threads) shared.disagreements[i / 64][i % 64] = 0;
    for (int64_t tile = first; tile < task.tiles; tile += stride) {
        const Source source = sources.sources[sources.activation_of(tile)];
        const int64_t position = (tile - source.first_tile) * kTile;
        block.sync();
        load_codes(block, sources, source, position, row, shared.codes[0]);
        if (row != column) load_codes(block, sources, source, position, column, shared.codes[1]);
        block.sync();
        compare_codes(block, shared.codes[0], shared.codes[row != column], shared.disagreements);
    }
    block.sync();
    for (int k = block.thread; k < 64 * 64; k += block.threads) {
        const int64_t i = 64 * row + k / 64, j = 64 * column + k % 64;
        if (i >= sources.samples || j >= sources.samples || shared.disagreements[k / 64][k % 64] == 0) continue;
        add(task.agreements + i * sources.samples + j, -int64_t{shared.disagreements[k / 64][k % 64]});
        if (row != column)
            add(task.agreements + j * sources.samples + i, -int64_t{shared.disagreements[k / 64][k % 64]});
    }
}

}  // namespace cuda
}  // namespace lswag
