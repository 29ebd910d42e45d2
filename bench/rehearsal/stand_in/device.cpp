// What a device says of itself.
#include <dlfcn.h>

#include <cstring>

#include "runtime.h"

using namespace rehearsal;

extern "C" {

cudaError_t cudaGetDeviceCount(int* number) {
    *number = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    const Lock lock;
    return device == 0 ? cudaSuccess : illegal(cudaErrorInvalidDevice, "cudaSetDevice of a device that does not exist");
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = kVersion;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = kVersion;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    std::strcpy(properties->name, "no device: a rehearsal");
    properties->totalGlobalMem = kMemoryBytes;
    properties->major = kMajor;
    properties->minor = kMinor;
    properties->multiProcessorCount = kMultiprocessors;
    properties->warpSize = kWarp;
    properties->maxThreadsPerBlock = kThreadsOfBlock;
    properties->maxThreadsPerMultiProcessor = kThreadsOfMultiprocessor;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = kThreadsOfBlock;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->regsPerBlock = properties->regsPerMultiprocessor = kRegisters;
    properties->sharedMemPerBlock = kSharedBytes;
    properties->sharedMemPerBlockOptin = kMostSharedBytes;
    properties->sharedMemPerMultiprocessor = kSharedBytesOfMultiprocessor;
    properties->l2CacheSize = kCacheBytes;
    properties->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<cudaDeviceAttr, int> values = {
        {cudaDevAttrComputeCapabilityMajor, kMajor},
        {cudaDevAttrComputeCapabilityMinor, kMinor},
        {cudaDevAttrMultiProcessorCount, kMultiprocessors},
        {cudaDevAttrWarpSize, kWarp},
        {cudaDevAttrMaxThreadsPerBlock, kThreadsOfBlock},
        {cudaDevAttrMaxThreadsPerMultiProcessor, kThreadsOfMultiprocessor},
        {cudaDevAttrMaxSharedMemoryPerBlock, kSharedBytes},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMostSharedBytes},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedBytesOfMultiprocessor},
        {cudaDevAttrMaxGridDimX, 0x7fffffff},
        {cudaDevAttrL2CacheSize, kCacheBytes},
        {cudaDevAttrUnifiedAddressing, 1},
    };
    const auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;  // most others ask what the device can do beside
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
    std::strncpy(text, "0000:00:00.0", static_cast<size_t>(length));
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result != nullptr)
        *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"
