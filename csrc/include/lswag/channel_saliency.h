// For every sample and channel, the sum over positions of outputs y times the gradients d there.
#pragma once

#include <cstdint>

#include "lswag/dispatch.h"
#include "lswag/tensor.h"

namespace lswag {

struct ChannelSaliency {
    Tensor outputs;          // [S, positions, C], float32, bfloat16 or float16, any strides
    Tensor output_grads;     // likewise, of the same dtype
    double* sums = nullptr;  // [S, C]
    int threads = 1;
};

LSWAG_KERNEL(channel_saliency, const ChannelSaliency& task)

}  // namespace lswag
