// The words of several activations in tiles of positions. A tile belongs to one activation; position p of the
// activation whose first tile is t has the number t * kTile + p.
#pragma once

#include "block.cuh"

namespace lswag {
namespace cuda {

constexpr int kTile = 1024;

struct Source {
    const uint64_t* words;  // [W, positions]
    int64_t positions;
    int64_t first_tile;
};

struct Sources {
    const Source* sources;
    int activations;
    int samples;  // S: bits at S and beyond are not part of a pattern

    LSWAG_DEVICE int width() const { return (samples + 63) / 64; }

    // An activation without positions has no tile; it shares its first tile with the next.
    LSWAG_DEVICE int activation_of(int64_t tile) const {
        int low = 0, high = activations;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (sources[middle].first_tile <= tile ? low : high) = middle;
        }
        return low;
    }

    LSWAG_DEVICE uint64_t word(const Source& source, int64_t position, int w) const {
        const uint64_t mask = w + 1 == width() ? ~uint64_t{0} >> (63 - (samples - 1) % 64) : ~uint64_t{0};
        return source.words[w * source.positions + position] & mask;
    }
};

}  // namespace cuda
}  // namespace lswag
