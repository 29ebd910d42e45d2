// Launching on a stream of a device, with every return code looked at.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lswag/activation_patterns_cuda.h"

namespace lswag {
namespace cuda {

inline void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess)
        throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(code));
}

// Makes a queue's device the current one until it is destroyed.
class OnDevice {
 public:
    explicit OnDevice(const Queue& queue) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(queue.device), "cudaSetDevice");
        int major = 0, minor = 0;
        const cudaError_t code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, queue.device);
        if (code == cudaSuccess) cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, queue.device);
        if (code == cudaSuccess && major >= 8) return;
        cudaSetDevice(previous_);
        check(code, "cudaDeviceGetAttribute");
        throw std::runtime_error("this device has compute capability " + std::to_string(major) + "." +
                                 std::to_string(minor) + "; 8.0 or newer is needed");
    }
    ~OnDevice() { cudaSetDevice(previous_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

 private:
    int previous_ = 0;
};

inline cudaStream_t stream_of(const Queue& queue) { return reinterpret_cast<cudaStream_t>(queue.stream); }

inline unsigned grid_size(int64_t blocks, const char* what) {
    if (blocks > 0x7fffffff) throw std::runtime_error(std::string(what) + ": more blocks than one launch can have");
    return static_cast<unsigned>(blocks);
}

}  // namespace cuda
}  // namespace lswag
