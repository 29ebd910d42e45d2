#include "lswag/activation_patterns_cuda.h"
#include "pattern_count.cuh"
#include "source_table.cuh"

namespace lswag {
namespace cuda {
namespace {

constexpr int kSetBits = 11;    // 2048 slots: with their masks 24 KB, so that six blocks share a multiprocessor
constexpr int kSetSteps = 128;  // at half full, as sets of partitions are, hardly any run is half as long
constexpr int64_t kMeanPartition = 1024;

__global__ void __launch_bounds__(kCountThreads) dedupe_tiles_kernel(const __grid_constant__ CountTask task) {
    __shared__ TileShared shared;
    dedupe_tile(DeviceBlock<kCountThreads>(), task, blockIdx.x, shared);
}

__global__ void __launch_bounds__(kScanThreads) scan_partitions_kernel(const __grid_constant__ CountTask task) {
    __shared__ ScanShared shared;
    scan_partitions(DeviceBlock<kScanThreads>(), task, shared);
}

__global__ void __launch_bounds__(kCountThreads) scatter_tiles_kernel(const __grid_constant__ CountTask task) {
    scatter_tile(DeviceBlock<kCountThreads>(), task, blockIdx.x);
}

__global__ void __launch_bounds__(kCountThreads) count_partitions_kernel(const __grid_constant__ CountTask task) {
    __shared__ CountShared<kSetBits> shared;
    PartitionCounter<kSetBits, kSetSteps>(task, shared).count(DeviceBlock<kCountThreads>(), blockIdx.x);
}

struct Layout {
    int64_t tiles = 0;
    int bits = 0;
    int64_t ends = 0;  // where the parts of the workspace begin, in int64
    int64_t entries[2] = {};
    int64_t size = 0;
};

Layout layout_of(const int64_t* positions, int64_t activations) {
    Layout layout;
    for (int64_t a = 0; a < activations; ++a) layout.tiles += tiles_of(positions[a]);
    while (layout.bits < kMaxPartitionBits && layout.tiles * kTile > kMeanPartition << layout.bits) ++layout.bits;
    layout.ends = activations * kSourceWords;
    layout.entries[0] = layout.ends + ((int64_t{1} << layout.bits) + 1) / 2;
    layout.entries[1] = layout.entries[0] + layout.tiles * kTile;
    layout.size = layout.entries[1] + layout.tiles * kTile;
    return layout;
}

}  // namespace

int64_t count_workspace(const std::vector<int64_t>& positions) {
    const Layout layout = layout_of(positions.data(), static_cast<int64_t>(positions.size()));
    return layout.tiles * kTile < int64_t{1} << 31 ? layout.size : -1;
}

void count_patterns(const PatternSet& set, int64_t* counts, int64_t* workspace, const Queue& queue) {
    const Layout layout = layout_of(set.positions, set.activations);
    const OnDevice device(queue);
    CountTask task = {};
    Source* table = reinterpret_cast<Source*>(workspace);
    task.sources = {table, static_cast<int>(set.activations), static_cast<int>(set.samples)};
    task.tiles = layout.tiles;
    task.bits = layout.bits;
    task.ends = reinterpret_cast<uint32_t*>(workspace + layout.ends);
    for (int i = 0; i < 2; ++i) task.entries[i] = reinterpret_cast<uint64_t*>(workspace + layout.entries[i]);
    task.counts = counts;
    const int64_t partitions = int64_t{1} << layout.bits;
    write_table(set, table, task.ends, partitions, counts, 1 + set.activations, 0, queue);
    if (layout.tiles == 0) return;
    const unsigned tiles = grid_size(layout.tiles, "counting patterns");
    dedupe_tiles_kernel<<<tiles, kCountThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching dedupe_tiles");
    scan_partitions_kernel<<<1, kScanThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching scan_partitions");
    scatter_tiles_kernel<<<tiles, kCountThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching scatter_tiles");
    count_partitions_kernel<<<static_cast<unsigned>(partitions), kCountThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching count_partitions");
}

}  // namespace cuda
}  // namespace lswag
