// Writes the table of sources, and what has to be so before anything is counted, into a workspace. The table comes by
// kernel arguments, so that no copy from the host's memory is needed: a captured graph would keep its address.
#pragma once

#include <vector>

#include "launch.h"
#include "pattern_sources.cuh"

namespace lswag {
namespace cuda {

constexpr int kSourcesPerLaunch = 64;
constexpr int64_t kSourceWords = sizeof(Source) / sizeof(int64_t);

inline int64_t tiles_of(int64_t positions) { return (positions + kTile - 1) / kTile; }

struct TablePart {
    Source sources[kSourcesPerLaunch];
    Source* table;
    int first;
    int count;
    uint32_t* zeros;
    int64_t zero_count;
    int64_t* filled;
    int64_t fill_count;
    int64_t fill;
};

static __global__ void __launch_bounds__(256) write_table_kernel(const __grid_constant__ TablePart part) {
    const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
    if (i < part.count) part.table[part.first + i] = part.sources[i];
    if (i < part.zero_count) part.zeros[i] = 0;
    if (i < part.fill_count) part.filled[i] = part.fill;
}

// Launches what writes the table of a set, zeros `zeros`, and fills `filled`.
inline void write_table(const PatternSet& set, Source* table, uint32_t* zeros, int64_t zero_count, int64_t* filled,
                        int64_t fill_count, int64_t fill, const Queue& queue) {
    int64_t tile = 0;
    for (int64_t first = 0; first < set.activations; first += kSourcesPerLaunch) {
        TablePart part = {};
        part.table = table;
        part.first = static_cast<int>(first);
        part.count =
            static_cast<int>(set.activations - first < kSourcesPerLaunch ? set.activations - first : kSourcesPerLaunch);
        for (int i = 0; i < part.count; ++i) {
            part.sources[i] = {set.words[first + i], set.positions[first + i], tile};
            tile += tiles_of(set.positions[first + i]);
        }
        if (first == 0) {
            part.zeros = zeros;
            part.zero_count = zero_count;
            part.filled = filled;
            part.fill_count = fill_count;
            part.fill = fill;
        }
        int64_t most = part.count;
        most = most < part.zero_count ? part.zero_count : most;
        most = most < part.fill_count ? part.fill_count : most;
        write_table_kernel<<<grid_size((most + 255) / 256, "the table of activations"), 256, 0, stream_of(queue)>>>(
            part);
        check(cudaGetLastError(), "launching write_table");
    }
}

}  // namespace cuda
}  // namespace lswag
