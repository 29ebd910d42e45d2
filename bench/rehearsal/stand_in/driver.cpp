// The CUDA driver, as Triton loads its kernels with and launches them.
#include <cuda.h>

#include <cstring>

#include "runtime.h"

namespace rehearsal {
namespace {

struct Kernel {
    std::string name;
    int shared_bytes = kSharedBytes;
};

// One context, which is always current.
CUcontext context() { return reinterpret_cast<CUcontext>(&state()); }

constexpr char kElf[] = "\177ELF";

}  // namespace
}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice* device, int) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    // Both enumerations have the same numbers.
    if (attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK) {
        *value = kRegisters;
        return CUDA_SUCCESS;
    }
    cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* found) {
    *found = context();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) { return cuCtxGetCurrent(found); }

// Of the memory that kernels print to, which none does.
CUresult cuCtxGetLimit(size_t* bytes, CUlimit) {
    *bytes = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
    *text = code == CUDA_SUCCESS ? "no error" : "refused by the stand-in, which says why";
    return CUDA_SUCCESS;
}

// A module is its machine code.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    if (std::memcmp(image, kElf, std::strlen(kElf)) != 0) return CUDA_ERROR_INVALID_IMAGE;
    *module = static_cast<CUmodule>(const_cast<void*>(image));
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    *function = reinterpret_cast<CUfunction>(new Kernel{name});
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? kThreadsOfBlock : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        reinterpret_cast<Kernel*>(function)->shared_bytes = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
    std::memcpy(value, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* given, CUfunction function, void**, void**) {
    const Lock lock;
    const Kernel& kernel = *reinterpret_cast<Kernel*>(function);
    if (given->sharedMemBytes > static_cast<unsigned>(kernel.shared_bytes)) {
        illegal(cudaErrorInvalidValue, kernel.name + ": more shared memory than it has asked for");
        return CUDA_ERROR_INVALID_VALUE;
    }
    const dim3 grid{given->gridDimX, given->gridDimY, given->gridDimZ};
    const dim3 block{given->blockDimX, given->blockDimY, given->blockDimZ};
    const cudaError_t code = take_launch(given->hStream, kernel.name.c_str(), grid, block, given->sharedMemBytes);
    return code == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // extern "C"
