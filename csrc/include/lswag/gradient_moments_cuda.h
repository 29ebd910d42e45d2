// Moments of |g| of linear weights on a Hopper GPU, from the tables of lswag_fast/kernels/gradient_moments_layout.py.
#pragma once

#include <cstdint>

#include "lswag/activation_patterns_cuda.h"
#include "lswag/tensor.h"

namespace lswag {
namespace cuda {

// The tiles of one launch. Everything lies on the device; nothing waits for it. Each tile's five sums come in two rows,
// so `first_tile` and `end_tile` count rows of `partials`, and there is an even number of them.
struct GroupedMoments {
    const int64_t* problems;
    const int64_t* uses;
    const int64_t* ends;        // [problem_count] one past each problem's last row of partials
    const int32_t* magnitudes;  // [2 * slots]
    double* partials;           // [end_tile, 5]
    int problem_count;
    int first_tile;
    int end_tile;
};

// Whether a device runs this kernel: compute capability 9.0, and a build that holds machine code for sm_90a. Throws
// std::runtime_error where there is no such device.
bool has_grouped_moments(int device);

// Throws std::runtime_error where it does not, or a launch fails. `dtype` is bfloat16 or float16.
void grouped_moments(const GroupedMoments& task, DType dtype, const Queue& queue);

}  // namespace cuda
}  // namespace lswag
