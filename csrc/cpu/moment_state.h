// The running moments of a tile of weights: Welford's update for one more group, and the sums at the end.
//
// Gradients are summed in float32, but in float64 where there are so few groups that a weight whose gradients nearly
// cancel in all of them can carry a layer's sum of 1 / sigma; not from bfloat16, whose rounding is in the operands.
// Means are kept in the type of the gradients, sums of squared deviations in float64: (1e-30)^2 must not underflow,
// and the smallest sigma of a layer dominates its sum of inverses. Equal magnitudes give a deviation of exactly zero.
//
// Of the signed gradients only means and signs are kept. As g^2 = |g|^2, their variance is that of |g| and the
// difference of the squared means, which is exactly zero where all signs agree. Where they do not, the variance is at
// least 1 / G of the squared mean, so that rounding of the means comes back no more than some G times as large.
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
    Real* mean;
    Real* signed_mean;
    Real* sign_sum;

    MomentState(void* memory, int64_t count) {
        deviations = static_cast<double*>(memory);
        mean = reinterpret_cast<Real*>(deviations + count);
        signed_mean = mean + count;
        sign_sum = signed_mean + count;
    }

    static constexpr int64_t bytes_per_weight(bool with_signed) {
        return sizeof(double) + (with_signed ? 3 : 1) * sizeof(Real);
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

// Moves a mean towards x, the value of group number `group`; returns x less the old mean.
template <typename Real, typename Vector>
inline Vector move_mean(Real* mean, Vector x, int64_t group) {
    const Vector old = load(mean);
    const Vector difference = x - old;
    store(mean, old + difference * splat(static_cast<Real>(1.0 / static_cast<double>(group + 1))));
    return difference;
}

// 1 with the sign of x; 0 where x is zero or NaN.
inline vfloat sign_of(vfloat x) {
    const vfloat one = float_of((bits_of(x) & 0x80000000u) | 0x3f800000u);
    return abs(x) > vfloat{} ? one : vfloat{};
}
inline vdouble sign_of(vdouble x) { return __builtin_convertvector((x < vdouble{}) - (x > vdouble{}), vdouble); }

// The variance of g less that of |g|.
inline double variance_of_signs(double mean, double signed_mean) {
    const double magnitude = __builtin_fabs(signed_mean);
    return magnitude > mean ? 0 : (mean - magnitude) * (mean + magnitude);
}
inline vdouble variance_of_signs(vdouble mean, vdouble signed_mean) {
    const vdouble magnitude = abs(signed_mean);
    return magnitude > mean ? vdouble{} : (mean - magnitude) * (mean + magnitude);
}

// Adds the gradients of group number `group` (the first call, 0, starts the state).
template <bool with_signed, typename Real>
inline void update_moments(const MomentState<Real>& state, const Real* gradients, int64_t count, int64_t group) {
    using Vector = decltype(load(gradients));
    constexpr int64_t lanes = sizeof(Vector) / sizeof(Real);
    if (group == 0) {
        __builtin_memset(state.deviations, 0, sizeof(double) * count);
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
        const Vector difference = move_mean(state.mean + w, abs(g), group);
        add_squares(state.deviations + w, difference, static_cast<double>(group) / static_cast<double>(group + 1));
        if (with_signed) {
            move_mean(state.signed_mean + w, g, group);
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
        const vdouble sum = load(state.deviations + w) * share + variance_of_signs(mean, signed_mean);
        const vdouble variance = sum + unless_finite(sum) + unless_finite(signed_mean);
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
    for (int s = 0; s < (with_signed ? kSaliency : kSignedLive); ++s) sums[s] += sum_lanes(totals[s]);
}

// Adds to totals[2] the products of mean gradients with `count` weights, and their magnitudes.
template <typename Real, typename Weight>
inline void add_saliency(const Real* signed_mean, const Weight* weights, int64_t count, vdouble* totals) {
    int64_t w = 0;
    for (; w + kLanes <= count; w += kLanes) {
        const vfloat values = load_float(weights + w);
        for (int half = 0; half < 2; ++half) {
            const vdouble product = load_double(signed_mean + w + half * kLanes / 2) * widen(values, half);
            totals[0] += product;
            totals[1] += abs(product);
        }
    }
    for (; w < count; ++w) {
        const double product = static_cast<double>(signed_mean[w]) * static_cast<double>(to_float(weights[w]));
        totals[0][0] += product;
        totals[1][0] += __builtin_fabs(product);
    }
}

// Adds to the sums the saliencies of `rows` x `count` weights: row `r` of the state begins at r * pitch, that of the
// weight at [row + r, column].
template <typename Real>
inline void sum_saliencies(const MomentState<Real>& state, int64_t pitch, const Tensor& weight, int64_t row,
                           int64_t rows, int64_t column, int64_t count, double* sums) {
    vdouble totals[2] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (row + r) * weight.strides[0] + column;
        const Real* const means = state.signed_mean + r * pitch;
        if (weight.dtype == DType::bfloat16)
            add_saliency(means, weight.as<const bfloat16>() + place, count, totals);
        else if (weight.dtype == DType::float16)
            add_saliency(means, weight.as<const float16>() + place, count, totals);
        else
            add_saliency(means, weight.as<const float>() + place, count, totals);
    }
    sums[kSaliency] += sum_lanes(totals[0]);
    sums[kAbsSaliency] += sum_lanes(totals[1]);
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
        const double mean = static_cast<double>(state.mean[from]);
        const double apart = variance_of_signs(mean, static_cast<double>(state.signed_mean[from]));
        maps.signed_sigma[place + w] = __builtin_sqrt(state.deviations[from] * share + apart) * unit;
        maps.signed_mean[place + w] = static_cast<double>(state.signed_mean[from]) * unit;
        maps.sign_sum[place + w] = static_cast<double>(state.sign_sum[from]);
    }
}

}  // namespace LSWAG_ISA
}  // namespace lswag
