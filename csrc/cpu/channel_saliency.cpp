// Outputs times their gradients, summed over positions: both operands are read once, in the order of memory where
// channels or positions lie next to one another, and nothing of their size is written.
//
// Floor: the bytes of both operands.
#include "lswag/channel_saliency.h"

#include "simd.h"

namespace lswag {
namespace LSWAG_ISA {
namespace {

// So many products are summed in float32 before they go to a float64 sum.
constexpr int kAtOnce = 4;

// One sample of an operand.
template <class T>
struct Plane {
    const T* data;
    int64_t position, channel;  // strides

    Plane(const Tensor& tensor, int64_t sample)
        : data(static_cast<const T*>(tensor.data) + sample * tensor.strides[0]),
          position(tensor.strides[1]),
          channel(tensor.strides[2]) {}
};

// Adds to sums[channels] the products at Count positions from `first`, of channels that are neighbours.
template <int Count, class T>
void add_positions(const Plane<T>& y, const Plane<T>& d, int64_t first, int64_t channels, double* sums) {
    const T* const from_y = y.data + first * y.position;
    const T* const from_d = d.data + first * d.position;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
        vfloat products = load_float(from_y + c) * load_float(from_d + c);
        for (int p = 1; p < Count; ++p)
            products += load_float(from_y + p * y.position + c) * load_float(from_d + p * d.position + c);
        for (int half = 0; half < 2; ++half) {
            double* const place = sums + c + half * kLanes / 2;
            store(place, load(place) + widen(products, half));
        }
    }
    for (; c < channels; ++c)
        for (int p = 0; p < Count; ++p)
            sums[c] += static_cast<double>(to_float(from_y[p * y.position + c]) * to_float(from_d[p * d.position + c]));
}

template <class T>
void add_lines(const Plane<T>& y, const Plane<T>& d, int64_t positions, int64_t channels, double* sums) {
    int64_t p = 0;
    for (; p + kAtOnce <= positions; p += kAtOnce) add_positions<kAtOnce>(y, d, p, channels, sums);
    for (; p < positions; ++p) add_positions<1>(y, d, p, channels, sums);
}

// Returns the sum of products of positions that are neighbours.
template <class T>
double dot(const T* y, const T* d, int64_t positions) {
    vdouble total[2] = {};
    int64_t p = 0;
    for (; p + kLanes <= positions; p += kLanes) {
        const vfloat products = load_float(y + p) * load_float(d + p);
        for (int half = 0; half < 2; ++half) total[half] += widen(products, half);
    }
    double sum = sum_lanes(total[0] + total[1]);
    for (; p < positions; ++p) sum += static_cast<double>(to_float(y[p]) * to_float(d[p]));
    return sum;
}

template <class T>
double dot_apart(const Plane<T>& y, const Plane<T>& d, int64_t channel, int64_t positions) {
    const T* const from_y = y.data + channel * y.channel;
    const T* const from_d = d.data + channel * d.channel;
    double sum = 0;
    for (int64_t p = 0; p < positions; ++p)
        sum += static_cast<double>(to_float(from_y[p * y.position]) * to_float(from_d[p * d.position]));
    return sum;
}

template <class T>
void sum_samples(const ChannelSaliency& task) {
    const int64_t samples = task.outputs.shape[0], positions = task.outputs.shape[1], channels = task.outputs.shape[2];
#pragma omp parallel for schedule(static) num_threads(task.threads) if (samples > 1)
    for (int64_t n = 0; n < samples; ++n) {
        const Plane<T> y(task.outputs, n), d(task.output_grads, n);
        double* const sums = task.sums + n * channels;
        if (y.channel == 1 && d.channel == 1) {
            __builtin_memset(sums, 0, channels * sizeof(double));
            add_lines(y, d, positions, channels, sums);
        } else if (y.position == 1 && d.position == 1) {
            for (int64_t c = 0; c < channels; ++c)
                sums[c] = dot(y.data + c * y.channel, d.data + c * d.channel, positions);
        } else {
            for (int64_t c = 0; c < channels; ++c) sums[c] = dot_apart(y, d, c, positions);
        }
    }
}

}  // namespace

void channel_saliency(const ChannelSaliency& task) {
    if (task.outputs.dtype == DType::float32) return sum_samples<float>(task);
    if (task.outputs.dtype == DType::bfloat16) return sum_samples<bfloat16>(task);
    sum_samples<float16>(task);
}

}  // namespace LSWAG_ISA
}  // namespace lswag
