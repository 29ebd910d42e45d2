// Launching on a stream of a device, with every return code looked at.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lswag/activation_patterns_cuda.h"

namespace lswag {
namespace cuda {

// Takes an error out of the runtime, too, which would blame the next launch for it.
inline bool succeeded(cudaError_t code) {
    if (code == cudaSuccess) return true;
    cudaGetLastError();
    return false;
}

inline void check(cudaError_t code, const char* what) {
    if (!succeeded(code))
        throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(code));
}

inline int attribute_of(int device, cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

// Ten times the number that NVIDIA gives it.
inline int compute_capability(int device) {
    return 10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) +
           attribute_of(device, cudaDevAttrComputeCapabilityMinor);
}

// Makes a queue's device the current one until it is destroyed.
class OnDevice {
 public:
    explicit OnDevice(const Queue& queue) {
        const int capability = compute_capability(queue.device);
        if (capability < 80)
            throw std::runtime_error("this device has compute capability " + std::to_string(capability / 10) + "." +
                                     std::to_string(capability % 10) + "; 8.0 or newer is needed");
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(queue.device), "cudaSetDevice");
    }
    // What this call of the runtime fails for, the next one fails for, too.
    ~OnDevice() { succeeded(cudaSetDevice(previous_)); }
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
