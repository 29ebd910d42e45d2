// Moments over groups of samples of the weight gradients g_k = (1/|k|) * sum over n in group k of d_n^T a_n, for
// inputs a and output gradients d, without storing any g. See lswag_fast/ops/gradient_moments.py for the definitions.
#pragma once

#include <cstdint>

#include "lswag/dispatch.h"
#include "lswag/tensor.h"

namespace lswag {

constexpr int kRowDims = 6;
constexpr int kColumnDims = 3;

// One spatial axis of a padded plane: element (row, column) lies at row * row_step + column * column_step - pad, and is
// zero where that is outside 0..size-1.
struct PlaneAxis {
    int64_t size = 0;
    int64_t row_step = 0;
    int64_t column_step = 0;
    int64_t pad = 0;
    int column_dim = 0;
};

// a or d of one sample as a matrix: rows are what the product sums over (tokens, output positions), columns are
// channels, and for the inputs of a convolution channels x kernel taps, gathered where they lie.
struct GradientOperand {
    Tensor tensor;
    int64_t offset = 0;  // of row 0 and column 0, in elements; before the data where the plane is padded
    int64_t sample_stride = 0;
    int64_t channel_group_stride = 0;
    int row_dims = 0;
    int64_t row_shape[kRowDims] = {};
    int64_t row_strides[kRowDims] = {};
    int64_t column_shape[kColumnDims] = {1, 1, 1};
    int64_t column_strides[kColumnDims] = {};
    bool padded = false;  // then row_dims is 2, and axes are those of the rows
    PlaneAxis axes[2];
};

// One use of the weight: its inputs, and the gradients at its outputs.
struct GradientUse {
    GradientOperand inputs;
    GradientOperand output_grads;
    int64_t rows = 0;  // a sample
};

struct GradientMomentsPlan {
    const GradientUse* uses = nullptr;
    int use_count = 0;
    int64_t samples = 0;
    int64_t groups = 0;
    int64_t channel_groups = 1;
    int64_t weight_rows = 0;     // O of one channel group
    int64_t weight_columns = 0;  // I, or channels x taps, of one channel group
    bool with_signed = false;
    // Where with_signed, and not empty: the weight itself, [rows, columns] in the order of the maps, columns adjacent.
    Tensor weight;
    int threads = 1;
    // A depthwise convolution (one channel in and out a group) is computed directly: the columns of both operands are
    // the channels, the rows of the inputs the positions of the padded plane.
    bool depthwise = false;
    int64_t kernel[2] = {1, 1};
    int64_t stride[2] = {1, 1};
    int64_t dilation[2] = {1, 1};
};

// The sums that a call gives, over all weights. Gradients are in units of 2^-exponent / (samples a group): multiply by
// that (its square where squared) for those of the definition.
enum MomentSum {
    kLive,
    kInverseSigma,   // live weights
    kMeanOverSigma,  // live weights
    kSigma,
    kMeanAbs,
    kSignedLive,     // from here on only with_signed; live: sigma of g > 2^-22 * |mean of g|
    kSignalToNoise,  // mean^2 / variance, signed live weights
    kAbsMean,
    kSquaredMean,
    kSignedSigma,
    kAbsSignSum,
    kSaliency,  // mean * weight, where the plan has the weight
    kAbsSaliency,
    kMomentSums
};

struct MomentResults {
    double sums[kMomentSums] = {};
    int64_t exponent = 0;
};

// Where the maps go, float64 [channel group, row, column] of the weight ([tap, channel] where depthwise), or null.
struct MomentMapPointers {
    double* sigma = nullptr;
    double* mean_abs = nullptr;
    double* signed_sigma = nullptr;
    double* signed_mean = nullptr;
    double* sign_sum = nullptr;
};

LSWAG_KERNEL(gradient_moments_workspace, const GradientMomentsPlan& plan, int64_t* bytes)
LSWAG_KERNEL(gradient_moments, const GradientMomentsPlan& plan, void* workspace, const MomentMapPointers& maps,
             MomentResults* results)

// The streaming form, in float64: contiguous gradients of `numel` weights, float32 or float64, group after group from
// 0. `state` has kStreamDoubles (kStreamDoublesSigned) doubles a weight, numel rounded up to a multiple of kStreamTile.
constexpr int64_t kStreamTile = 512;
constexpr int64_t kStreamDoubles = 2;
constexpr int64_t kStreamDoublesSigned = 4;
LSWAG_KERNEL(accumulate_moments, const Tensor& gradient, int64_t numel, int64_t group, bool with_signed, int threads,
             double* state)
LSWAG_KERNEL(finish_moments, double* state, int64_t numel, int64_t groups, bool with_signed,
             const MomentMapPointers& maps, MomentResults* results)

}  // namespace lswag
