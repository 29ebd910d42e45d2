// Stands in for the CUDA runtime beneath the objects of csrc/cuda. Nothing runs: what they ask of it is written down in
// order, and the call that a test names fails. Whatever else of the runtime they come to call is missing here, and with
// it the module that is linked against this.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int kDevices = 2;

struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

struct Runtime {
    std::map<const void*, std::string> kernels;  // by the address of their function on the host
    std::vector<Configuration> configurations;   // of launches that have begun
    std::vector<std::string> calls;              // JSON
    int failing_call = -1;
    cudaError_t failure = cudaErrorUnknown;  // of that call
    cudaError_t last_error = cudaSuccess;
    int device = 0;
    int major = 9, minor = 0, multiprocessors = 132;
    size_t static_shared_bytes = 1024;  // of any kernel
};

// Never destroyed: binaries are unregistered when the process ends.
Runtime& runtime() {
    static Runtime& only = *new Runtime;
    return only;
}

cudaError_t failed(cudaError_t code) {
    runtime().last_error = code;
    return code;
}

std::string field(const char* name, const std::string& json) { return std::string(",\"") + name + "\":" + json; }

std::string of_device(int device) { return field("device", std::to_string(device)); }

std::string of_kernel(const void* kernel) { return field("kernel", '"' + runtime().kernels[kernel] + '"'); }

std::string list(dim3 sizes) {
    return '[' + std::to_string(sizes.x) + ',' + std::to_string(sizes.y) + ',' + std::to_string(sizes.z) + ']';
}

// Writes a call down, and returns what it returns.
cudaError_t called(const char* function, const std::string& fields) {
    Runtime& now = runtime();
    const bool fails = static_cast<int>(now.calls.size()) == now.failing_call;
    now.calls.push_back(std::string("{\"call\":\"") + function + '"' + fields + '}');
    return fails ? failed(now.failure) : cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    std::string fields = of_kernel(kernel) + of_device(runtime().device) + field("grid", list(grid));
    fields += field("block", list(block)) + field("shared_bytes", std::to_string(shared_bytes));
    fields += field("stream", std::to_string(reinterpret_cast<uintptr_t>(stream)));
    return called("launch", fields);
}

}  // namespace

extern "C" {

// What tests ask.

const char* recorded_calls() {
    static std::string text;
    text = "[";
    for (const std::string& call : runtime().calls) text += (text.size() > 1 ? "," : "") + call;
    text += ']';
    return text.c_str();
}

void start_recording(int failing_call, int failure) {
    runtime().calls.clear();
    runtime().failing_call = failing_call;
    runtime().failure = static_cast<cudaError_t>(failure);
}

void set_device(int major, int minor, int multiprocessors, int static_shared_bytes) {
    Runtime& now = runtime();
    now.major = major;
    now.minor = minor;
    now.multiprocessors = multiprocessors;
    now.static_shared_bytes = static_cast<size_t>(static_shared_bytes);
}

int current_device() { return runtime().device; }

// What csrc/cuda calls by name.

cudaError_t cudaGetDevice(int* device) {
    *device = runtime().device;
    return called("cudaGetDevice", of_device(*device));
}

cudaError_t cudaSetDevice(int device) {
    const cudaError_t code = called("cudaSetDevice", of_device(device));
    if (code != cudaSuccess) return code;
    if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
    runtime().device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const cudaError_t code = called("cudaDeviceGetAttribute", of_device(device));
    if (code != cudaSuccess) return code;
    if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = runtime().major;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = runtime().minor;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = runtime().multiprocessors;
            return cudaSuccess;
        default:
            return failed(cudaErrorInvalidValue);
    }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    attributes->sharedSizeBytes = runtime().static_shared_bytes;
    return called("cudaFuncGetAttributes", of_kernel(kernel));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    return called("cudaFuncSetAttribute", of_kernel(kernel) + of_device(runtime().device) +
                                              field("attribute", std::to_string(attribute)) +
                                              field("value", std::to_string(value)));
}

cudaError_t cudaGetLastError() {
    const cudaError_t code = runtime().last_error;
    runtime().last_error = cudaSuccess;
    return code;
}

const char* cudaGetErrorString(cudaError_t code) { return code == cudaErrorUnknown ? "as asked" : "another error"; }

// What nvcc makes of <<<>>>, up to CUDA 12 and since.

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    runtime().configurations.push_back({grid, block, shared_bytes, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    const Configuration configuration = runtime().configurations.back();
    runtime().configurations.pop_back();
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                             cudaStream_t stream) {
    return launch(kernel, grid, block, shared_bytes, stream);
}

cudaError_t __cudaGetKernel(const void** handle, const void* kernel) {
    *handle = kernel;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(const void* handle, dim3 grid, dim3 block, void**, size_t shared_bytes,
                               cudaStream_t stream) {
    return launch(handle, grid, block, shared_bytes, stream);
}

// How an object brings its kernels.

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    runtime().kernels[kernel] = name;
}

}  // extern "C"
