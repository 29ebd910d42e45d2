// Numbers of the host brought to a GPU by the arguments of kernels: nothing reads the host's memory later, so that no
// copy has to be waited for and a captured graph brings the same numbers at every replay.
#pragma once

#include <cstdint>

#include "lswag/activation_patterns_cuda.h"

namespace lswag {
namespace cuda {

// Writes numbers [count] to `out`, on a stream. Throws std::runtime_error where a launch fails.
void write_numbers(const int64_t* numbers, int64_t count, int64_t* out, const Queue& queue);

}  // namespace cuda
}  // namespace lswag
