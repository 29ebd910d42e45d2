// The streaming form of gradient_moments: group gradients come one after the other, already computed.
#include "lswag/gradient_moments.h"
#include "moment_state.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

constexpr int64_t kTile = kStreamTile;

MomentState<double> tile_state(double* state, int64_t tile, bool with_signed) {
    const int64_t doubles = MomentState<double>::bytes_per_weight(with_signed) / 8 * kTile;
    return MomentState<double>(state + tile * doubles, kTile);
}

}  // namespace

void accumulate_moments(const Tensor& gradient, int64_t numel, int64_t group, bool with_signed, int threads,
                        double* state) {
#pragma omp parallel for num_threads(threads) if (numel > 64 * kTile)
    for (int64_t tile = 0; tile < (numel + kTile - 1) / kTile; ++tile) {
        double values[kTile] = {};
        const int64_t begin = tile * kTile, count = numel - begin < kTile ? numel - begin : kTile;
        if (gradient.dtype == DType::float64)
            __builtin_memcpy(values, static_cast<const double*>(gradient.data) + begin, count * 8);
        else
            for (int64_t w = 0; w < count; ++w) values[w] = static_cast<const float*>(gradient.data)[begin + w];
        if (with_signed)
            update_moments<true>(tile_state(state, tile, true), values, kTile, group);
        else
            update_moments<false>(tile_state(state, tile, false), values, kTile, group);
    }
}

void finish_moments(double* state, int64_t numel, int64_t groups, bool with_signed, const MomentMapPointers& maps,
                    MomentResults* results) {
    for (int64_t tile = 0; tile < (numel + kTile - 1) / kTile; ++tile) {
        const MomentState<double> moments = tile_state(state, tile, with_signed);
        if (with_signed)
            sum_moments<true>(moments, kTile, groups, results->sums);
        else
            sum_moments<false>(moments, kTile, groups, results->sums);
        const int64_t begin = tile * kTile;
        if (maps.sigma != nullptr)
            write_maps(moments, 0, numel - begin < kTile ? numel - begin : kTile, groups, 1.0, maps, begin);
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
