#include <algorithm>

#include "lswag/activation_patterns_cuda.h"
#include "pattern_agreement.cuh"
#include "source_table.cuh"

namespace lswag {
namespace cuda {
namespace {

// Enough to fill 132 multiprocessors with six blocks each; more would only add to the final additions.
constexpr int64_t kBlocks = 1056;

__global__ void __launch_bounds__(kAgreementThreads)
    count_agreements_kernel(const __grid_constant__ AgreementTask task) {
    __shared__ AgreementShared shared;
    int row = 0, pair = static_cast<int>(blockIdx.y);
    while (pair > row) pair -= ++row;
    count_agreements(DeviceBlock<kAgreementThreads>(), task, row, pair, blockIdx.x, gridDim.x, shared);
}

}  // namespace

int64_t agreement_workspace(int64_t activations) { return activations * kSourceWords; }

void count_agreements(const PatternSet& set, int64_t* agreements, int64_t* workspace, const Queue& queue) {
    int64_t positions = 0;
    AgreementTask task = {};
    for (int64_t a = 0; a < set.activations; ++a) {
        positions += set.positions[a];
        task.tiles += tiles_of(set.positions[a]);
    }
    const OnDevice device(queue);
    Source* table = reinterpret_cast<Source*>(workspace);
    task.sources = {table, static_cast<int>(set.activations), static_cast<int>(set.samples)};
    task.agreements = agreements;
    write_table(set, table, nullptr, 0, agreements, set.samples * set.samples, positions, queue);
    if (task.tiles == 0) return;
    const int64_t words = (set.samples + 63) / 64;
    const int64_t pairs = words * (words + 1) / 2;
    const int64_t blocks = std::min(task.tiles, std::max(int64_t{1}, kBlocks / pairs));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(pairs));
    count_agreements_kernel<<<grid, kAgreementThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching count_agreements");
}

}  // namespace cuda
}  // namespace lswag
