// Launches of kernels: how an object brings them, what nvcc makes of <<<>>>, and what a launch can have.
#include "runtime.h"

namespace rehearsal {
namespace {

// Beside the limit of a block: of a grid, and of a block's last axis.
constexpr unsigned kGridX = 0x7fffffff, kGridYZ = 65535, kBlockZ = 64;
// Of a kernel whose own is not known, as none is here.
constexpr size_t kStaticSharedBytes = 1024;

struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;  // of launches that have begun

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    const Lock lock;
    const auto name = state().kernels.find(function);
    if (name == state().kernels.end()) return illegal(cudaErrorInvalidDeviceFunction, "a launch of what is no kernel");
    const auto asked = state().shared_bytes.find(function);
    const size_t room = asked == state().shared_bytes.end() ? kSharedBytes : asked->second;
    if (shared_bytes > room)
        return illegal(cudaErrorInvalidValue, name->second + ": more shared memory than it has asked for");
    return take_launch(stream, name->second.c_str(), grid, block, shared_bytes);
}

}  // namespace

cudaError_t take_launch(cudaStream_t stream, const char* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    const auto within = [](unsigned size, unsigned most) { return size > 0 && size <= most; };
    if (!within(grid.x, kGridX) || !within(grid.y, kGridYZ) || !within(grid.z, kGridYZ))
        return illegal(cudaErrorInvalidConfiguration, std::string(kernel) + ": no such grid");
    if (!within(block.x, kThreadsOfBlock) || !within(block.y, kThreadsOfBlock) || !within(block.z, kBlockZ) ||
        block.x * block.y * block.z > kThreadsOfBlock)
        return illegal(cudaErrorInvalidConfiguration, std::string(kernel) + ": no such block");
    if (shared_bytes > kMostSharedBytes)
        return illegal(cudaErrorInvalidValue, std::string(kernel) + ": more shared memory than a block can have");
    return take(stream, kLaunches, kernel);
}

}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    const Lock lock;
    state().kernels[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
    configurations.push_back({grid, block, shared_bytes, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared_bytes = last.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                               cudaStream_t stream) {
    return launch(kernel, grid, block, shared_bytes, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared_bytes,
                             cudaStream_t stream) {
    return launch(function, grid, block, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* given, const void* function, void**) {
    return launch(function, given->gridDim, given->blockDim, given->dynamicSmemBytes, given->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const Lock lock;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > kMostSharedBytes)
        return illegal(cudaErrorInvalidValue, "a kernel asks for more shared memory than a block can have");
    state().shared_bytes[function] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->sharedSizeBytes = kStaticSharedBytes;
    attributes->maxDynamicSharedSizeBytes = kSharedBytes;
    attributes->maxThreadsPerBlock = kThreadsOfBlock;
    attributes->numRegs = kRegisters / kThreadsOfBlock;
    attributes->binaryVersion = attributes->ptxVersion = 10 * kMajor + kMinor;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t,
                                                                   unsigned) {
    *blocks = kThreadsOfMultiprocessor / threads;
    return cudaSuccess;
}

}  // extern "C"
