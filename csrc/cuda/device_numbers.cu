#include <algorithm>

#include "launch.h"
#include "lswag/device_numbers_cuda.h"

namespace lswag {
namespace cuda {
namespace {

// The arguments of a launch take up to 32,764 bytes, or 4,096 before CUDA 12.1.
#if CUDART_VERSION >= 12010
constexpr int kNumbers = 4088;
#else
constexpr int kNumbers = 504;
#endif
constexpr int kThreads = 128;

struct Numbers {
    int64_t* out;
    int64_t count;
    int64_t values[kNumbers];
};

__global__ void __launch_bounds__(kThreads) write_numbers_kernel(const __grid_constant__ Numbers numbers) {
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < numbers.count) numbers.out[i] = numbers.values[i];
}

}  // namespace

void write_numbers(const int64_t* numbers, int64_t count, int64_t* out, const Queue& queue) {
    const OnDevice device(queue);
    Numbers part;
    for (int64_t first = 0; first < count; first += kNumbers) {
        part.out = out + first;
        part.count = std::min<int64_t>(kNumbers, count - first);
        std::copy(numbers + first, numbers + first + part.count, part.values);
        std::fill(part.values + part.count, part.values + kNumbers, 0);
        const unsigned blocks = static_cast<unsigned>((part.count + kThreads - 1) / kThreads);
        write_numbers_kernel<<<blocks, kThreads, 0, stream_of(queue)>>>(part);
        check(cudaGetLastError(), "launching write_numbers");
    }
}

}  // namespace cuda
}  // namespace lswag
