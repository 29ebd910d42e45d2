// Depthwise convolutions, one channel in and out a group: no matrix product to speak of, so the kernel taps are
// correlated directly, a vector of channels at a time.
//
// Floor: 2 * S * OH * OW * C * KH * KW operations; a tap costs one load and one fused multiply-add, so two loads a
// cycle bound it at half the rate of a matrix product.
#include "gradient_panels.h"
#include "lswag/gradient_moments.h"
#include "moment_state.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lswag {
namespace LSWAG_ISA {
namespace {

constexpr int64_t kTapsAtOnce = 7;

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// What a thread needs: a padded plane of the inputs and one of the output gradients, kLanes channels each, the gradient
// of their taps, what several such planes of a group add up to, and the moments.
struct Layout {
    int64_t blocks, taps, plane, gradient_plane, gradients, totals, state, thread_bytes;
    bool wide;  // totals and moments are float64: float32 sums over several planes would exceed the tolerance

    explicit Layout(const GradientMomentsPlan& plan) {
        blocks = (plan.channel_groups + kLanes - 1) / kLanes;
        taps = plan.kernel[0] * plan.kernel[1];
        plane = gradient_plane = 0;
        for (int u = 0; u < plan.use_count; ++u) {
            const GradientUse& use = plan.uses[u];
            const int64_t positions = use.inputs.row_shape[0] * use.inputs.row_shape[1];
            plane = positions > plane ? positions : plane;
            gradient_plane = use.rows > gradient_plane ? use.rows : gradient_plane;
        }
        plane = round_up(plane * kLanes * 4);
        gradient_plane = round_up(gradient_plane * kLanes * 4);
        wide = sums_in_float64(plan) || plan.use_count > 1 || plan.samples > plan.groups;
        gradients = round_up(taps * kLanes * (sums_in_float64(plan) ? 8 : 4));
        totals = wide && !sums_in_float64(plan) ? round_up(taps * kLanes * 8) : 0;
        state = round_up(taps * kLanes *
                         (wide ? MomentState<double>::bytes_per_weight(plan.with_signed)
                               : MomentState<float>::bytes_per_weight(plan.with_signed)));
        thread_bytes = plane + gradient_plane + gradients + totals + state;
    }
};

void pack_plane(const GradientOperand& operand, int64_t sample, int64_t channel, int64_t channels, float scale,
                float* plane) {
    const int64_t rows = operand.row_shape[0] * operand.row_shape[1];
    const int64_t end = channel + kLanes < channels ? channel + kLanes : channels;
    for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
        RowTable table;
        list_rows(operand, rows, sample, begin, rows - begin < kChunkRows ? rows - begin : kChunkRows, table);
        pack_operand<kLanes>(operand, 0, table, channel, end, scale, plane + begin * kLanes, 0);
    }
}

vfloat load_as(const float* p, vfloat) { return load(p); }
vdouble load_as(const float* p, vdouble) { return load_double(p); }

// Adds to Count neighbouring taps of one kernel row the products along one row of output positions; of a vector of
// channels at a time as many as sums of Real take a register.
template <int Count, typename Real>
void add_row(const float* inputs, const float* output_grads, int64_t positions, int64_t step, int64_t dilation,
             Real* gradients) {
    using Vector = decltype(load(gradients));
    constexpr int64_t channels = sizeof(Vector) / sizeof(Real);
    for (int64_t c = 0; c < kLanes; c += channels) {
        Vector sum[Count] = {};
        for (int64_t p = 0; p < positions; ++p) {
            const Vector d = load_as(output_grads + p * kLanes + c, Vector{});
            for (int tap = 0; tap < Count; ++tap)
                sum[tap] += d * load_as(inputs + p * step + tap * dilation + c, Vector{});
        }
        for (int tap = 0; tap < Count; ++tap) {
            Real* const place = gradients + tap * kLanes + c;
            store(place, load(place) + sum[tap]);
        }
    }
}

template <typename Real>
using AddRow = void (*)(const float*, const float*, int64_t, int64_t, int64_t, Real*);
template <typename Real>
constexpr AddRow<Real> kAddRow[kTapsAtOnce] = {add_row<1, Real>, add_row<2, Real>, add_row<3, Real>, add_row<4, Real>,
                                               add_row<5, Real>, add_row<6, Real>, add_row<7, Real>};

template <typename Real>
void correlate(const GradientMomentsPlan& plan, const GradientUse& use, const float* plane, const float* output_grads,
               Real* gradients) {
    const int64_t width = use.inputs.row_shape[1] * kLanes;
    const int64_t out_height = use.output_grads.row_shape[0], out_width = use.output_grads.row_shape[1];
    for (int64_t ky = 0; ky < plan.kernel[0]; ++ky) {
        for (int64_t y = 0; y < out_height; ++y) {
            const float* const from = plane + (y * plan.stride[0] + ky * plan.dilation[0]) * width;
            const float* const row = output_grads + y * out_width * kLanes;
            for (int64_t kx = 0; kx < plan.kernel[1]; kx += kTapsAtOnce) {
                const int64_t rest = plan.kernel[1] - kx, count = rest < kTapsAtOnce ? rest : kTapsAtOnce;
                kAddRow<Real>[count - 1](from + kx* plan.dilation[1]* kLanes, row, out_width, plan.stride[1]* kLanes,
                                         plan.dilation[1]* kLanes, gradients + (ky* plan.kernel[1] + kx)* kLanes);
            }
        }
    }
}

// Adds the gradient of one plane to the total of its group, and clears it.
void add_to_totals(float* gradients, double* totals, int64_t weights) {
    for (int64_t w = 0; w < weights; w += kLanes / 2) store(totals + w, load(totals + w) + load_double(gradients + w));
    __builtin_memset(gradients, 0, weights * sizeof(float));
}

// Sums of Sum over one plane, of Real over the planes of a group where the two differ.
template <typename Sum, typename Real>
void channel_block(const GradientMomentsPlan& plan, const Layout& layout, int64_t block, char* memory,
                   const float scales[2], double unit, const MomentMapPointers& maps, double* sums) {
    const int64_t channels = plan.channel_groups, channel = block * kLanes, weights = layout.taps * kLanes;
    float* const plane = reinterpret_cast<float*>(memory);
    float* const output_grads = reinterpret_cast<float*>(memory + layout.plane);
    memory += layout.plane + layout.gradient_plane;
    Sum* const gradients = reinterpret_cast<Sum*>(memory);
    Real* const totals = reinterpret_cast<Real*>(memory + (layout.totals > 0 ? layout.gradients : 0));
    const MomentState<Real> state(memory + layout.gradients + layout.totals, weights);
    const int64_t size = plan.samples / plan.groups;
    for (int64_t group = 0; group < plan.groups; ++group) {
        __builtin_memset(memory, 0, layout.gradients + layout.totals);
        for (int64_t sample = group * size; sample < (group + 1) * size; ++sample) {
            for (int u = 0; u < plan.use_count; ++u) {
                pack_plane(plan.uses[u].inputs, sample, channel, channels, scales[0], plane);
                pack_plane(plan.uses[u].output_grads, sample, channel, channels, scales[1], output_grads);
                correlate(plan, plan.uses[u], plane, output_grads, gradients);
                if constexpr (sizeof(Sum) != sizeof(Real)) add_to_totals(gradients, totals, weights);
            }
        }
        if (plan.with_signed)
            update_moments<true>(state, totals, weights, group);
        else
            update_moments<false>(state, totals, weights, group);
    }
    if (plan.with_signed)
        sum_moments<true>(state, weights, plan.groups, sums);
    else
        sum_moments<false>(state, weights, plan.groups, sums);
    const int64_t count = channels - channel < kLanes ? channels - channel : kLanes;
    if (plan.weight.data != nullptr) sum_saliencies(state, kLanes, plan.weight, 0, layout.taps, channel, count, sums);
    if (maps.sigma == nullptr) return;
    for (int64_t tap = 0; tap < layout.taps; ++tap)
        write_maps(state, tap * kLanes, count, plan.groups, unit, maps, tap * channels + channel);
}

}  // namespace

void depthwise_workspace(const GradientMomentsPlan& plan, int64_t* bytes) {
    const Layout layout(plan);
    *bytes = round_up(layout.blocks * kMomentSums * 8) + plan.threads * layout.thread_bytes;
}

void depthwise_moments(const GradientMomentsPlan& plan, void* workspace, const float scales[2], double unit,
                       const MomentMapPointers& maps, MomentResults* results) {
    const Layout layout(plan);
    double* const sums = static_cast<double*>(workspace);
    char* const memory = static_cast<char*>(workspace) + round_up(layout.blocks * kMomentSums * 8);
    __builtin_memset(sums, 0, layout.blocks * kMomentSums * 8);
    const auto run_block = sums_in_float64(plan) ? channel_block<double, double>
                           : layout.wide         ? channel_block<float, double>
                                                 : channel_block<float, float>;
#pragma omp parallel for num_threads(plan.threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < layout.blocks; ++block)
        run_block(plan, layout, block, memory + thread_number() * layout.thread_bytes, scales, unit, maps,
                  sums + block * kMomentSums);
    for (int64_t block = 0; block < layout.blocks; ++block)
        for (int s = 0; s < kMomentSums; ++s) results->sums[s] += sums[block * kMomentSums + s];
}

}  // namespace LSWAG_ISA
}  // namespace lswag
