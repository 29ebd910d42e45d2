// The running moments of a tile of weights: Welford's update for one more group, and the sums at the end.
//
// Gradients are summed in float32, but in float64 where there are so few groups that a weight whose gradients nearly
// cancel in all of them can carry a layer's sum of 1 / sigma; not from bfloat16, whose rounding is in the operands.
// Means are kept in the type of the gradients, sums of squared deviations in float64: (1e-30)^2 must not underflow,
// and the smallest sigma of a layer dominates its sum of inverses. Equal magnitudes give a deviation of exactly zero.
#pragma once

#include "lswag/gradient_moments.h"
#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {

constexpr double kDead = 0x1p-22;  // of the mean: a sigma below it is made by rounding
constexpr int64_t kFewGroups = 3;

inline bool all_bfloat16(const GradientMomentsPlan& plan) {
    for (int u = 0; u < plan.use_count; ++u)
        if (plan.uses[u].inputs.tensor.dtype != DType::bfloat16 ||
            plan.uses[u].output_grads.tensor.dtype != DType::bfloat16)
            return false;
    return true;
}

inline bool sums_in_float64(const GradientMomentsPlan& plan) {
    return plan.groups <= kFewGroups && !all_bfloat16(plan);
}

// The arrays of `count` weights, a whole number of vectors of Real, one after the other from `memory`.
template <typename Real>
struct MomentState {
    double* deviations;
    double* signed_deviations;
    Real* mean;
    Real* signed_mean;
    Real* sign_sum;

    MomentState(void* memory, int64_t count, bool with_signed) {
        deviations = static_cast<double*>(memory);
        signed_deviations = deviations + count;
        mean = reinterpret_cast<Real*>(deviations + (with_signed ? 2 : 1) * count);
        signed_mean = mean + count;
        sign_sum = signed_mean + count;
    }

    static constexpr int64_t bytes_per_weight(bool with_signed) {
        return with_signed ? 2 * sizeof(double) + 3 * sizeof(Real) : sizeof(double) + sizeof(Real);
    }
};

inline vdouble abs(vdouble x) { return x < vdouble{} ? -x : x; }

inline void add_squares(double* deviations, vfloat difference, double weight) {
    for (int half = 0; half < 2; ++half) {
        double* const place = deviations + half * kLanes / 2;
        const vdouble wide = widen(difference, half);
        store(place, load(place) + wide * (wide * splat(weight)));
    }
}
inline void add_squares(double* deviations, vdouble difference, double weight) {
    store(deviations, load(deviations) + difference * (difference * splat(weight)));
}

template <typename Real, typename Vector>
inline void add_value(Real* mean, double* deviations, Vector x, int64_t group) {
    const Vector old = load(mean);
    const Vector difference = x - old;
    store(mean, old + difference * splat(static_cast<Real>(1.0 / static_cast<double>(group + 1))));
    add_squares(deviations, difference, static_cast<double>(group) / static_cast<double>(group + 1));
}

template <typename Vector>
inline Vector sign_of(Vector x) {
    return __builtin_convertvector((x < Vector{}) - (x > Vector{}), Vector);
}

// Adds the gradients of group number `group` (the first call, 0, starts the state).
template <bool with_signed, typename Real>
inline void update_moments(const MomentState<Real>& state, const Real* gradients, int64_t count, int64_t group) {
    using Vector = decltype(load(gradients));
    constexpr int64_t lanes = sizeof(Vector) / sizeof(Real);
    if (group == 0) {
        __builtin_memset(state.deviations, 0, sizeof(double) * count * (with_signed ? 2 : 1));
        for (int64_t w = 0; w < count; w += lanes) {
            const Vector g = load(gradients + w);
            store(state.mean + w, abs(g));
            if (with_signed) store(state.signed_mean + w, g);
            if (with_signed) store(state.sign_sum + w, sign_of(g));
        }
        return;
    }
    for (int64_t w = 0; w < count; w += lanes) {
        const Vector g = load(gradients + w);
        add_value(state.mean + w, state.deviations + w, abs(g), group);
        if (with_signed) {
            add_value(state.signed_mean + w, state.signed_deviations + w, g, group);
            store(state.sign_sum + w, load(state.sign_sum + w) + sign_of(g));
        }
    }
}

inline vdouble square_root(vdouble x) {
    vdouble root = x;
    for (int lane = 0; lane < kLanes / 2; ++lane) root[lane] = __builtin_sqrt(x[lane]);
    return root;
}

// 0 where x is finite, else NaN.
inline vdouble unless_finite(vdouble x) { return x - x; }

// Adds the sums over `count` weights to sums[kMomentSums]. Weights that were never anything but zero are dead, and add
// to none of them, so that the padding of a tile need not be told apart. A weight with a gradient that is not finite is
// live, and makes NaN of every sum but the counts and signs.
template <bool with_signed, typename Real>
inline void sum_moments(const MomentState<Real>& state, int64_t count, int64_t groups, double* sums) {
    const vdouble share = splat(1.0 / static_cast<double>(groups));
    vdouble totals[kMomentSums] = {};
    for (int64_t w = 0; w < count; w += kLanes / 2) {
        const vdouble mean = load_double(state.mean + w);
        const vdouble root = square_root(load(state.deviations + w) * share);
        const vdouble sigma = root + unless_finite(root) + unless_finite(mean);
        const vlong dead = sigma <= mean * splat(kDead);
        const vdouble inverse = dead ? vdouble{} : splat(1.0) / sigma;
        totals[kLive] += dead ? vdouble{} : splat(1.0);
        totals[kInverseSigma] += inverse;
        totals[kMeanOverSigma] += mean * inverse;
        totals[kSigma] += sigma;
        totals[kMeanAbs] += mean + unless_finite(mean);
        if (!with_signed) continue;
        const vdouble with_sign = load_double(state.signed_mean + w);
        const vdouble signed_mean = with_sign + unless_finite(with_sign);
        const vdouble square_mean = load(state.signed_deviations + w) * share;
        const vdouble variance = square_mean + unless_finite(square_mean) + unless_finite(signed_mean);
        const vdouble signed_sigma = square_root(variance);
        const vlong still = signed_sigma <= abs(signed_mean) * splat(kDead);
        const vdouble square = signed_mean * signed_mean;
        totals[kSignedLive] += still ? vdouble{} : splat(1.0);
        totals[kSignalToNoise] += still ? vdouble{} : square / variance;
        totals[kAbsMean] += abs(signed_mean);
        totals[kSquaredMean] += square;
        totals[kSignedSigma] += signed_sigma;
        totals[kAbsSignSum] += abs(load_double(state.sign_sum + w));
    }
    for (int s = 0; s < (with_signed ? kMomentSums : kSignedLive); ++s) sums[s] += sum_lanes(totals[s]);
}

// Writes weights begin..begin+count of the state to the maps at `place`, gradients multiplied by `unit`.
template <typename Real>
inline void write_maps(const MomentState<Real>& state, int64_t begin, int64_t count, int64_t groups, double unit,
                       const MomentMapPointers& maps, int64_t place) {
    const double share = 1.0 / static_cast<double>(groups);
    for (int64_t w = 0; w < count; ++w) {
        const int64_t from = begin + w;
        maps.sigma[place + w] = __builtin_sqrt(state.deviations[from] * share) * unit;
        maps.mean_abs[place + w] = static_cast<double>(state.mean[from]) * unit;
        if (maps.signed_sigma == nullptr) continue;
        maps.signed_sigma[place + w] = __builtin_sqrt(state.signed_deviations[from] * share) * unit;
        maps.signed_mean[place + w] = static_cast<double>(state.signed_mean[from]) * unit;
        maps.sign_sum[place + w] = static_cast<double>(state.sign_sum[from]);
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
