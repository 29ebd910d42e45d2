// Memory of the device and pinned memory of the host, and what moves it.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace rehearsal {
namespace {

constexpr size_t kPage = 4096;
// Each byte of what comes from the device: true, 0.75 in float32 and bfloat16, 1.8 in float16, 5e-4 in float64.
constexpr int kArrives = 0x3f;

cudaError_t allocate(void** pointer, size_t bytes, bool on_device, const char* caller) {
    *pointer = nullptr;
    count(on_device ? kDeviceAllocations : kHostAllocations, caller);
    if (const cudaError_t code = allowed_while_capturing(caller)) return code;
    const size_t whole = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    const int64_t after = state().bytes_on_device + static_cast<int64_t>(on_device ? whole : 0);
    if (after > kMemoryBytes) return failed(cudaErrorMemoryAllocation);
    const int access = on_device ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* found = mmap(nullptr, whole, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    state().blocks[reinterpret_cast<uintptr_t>(found)] = {whole, on_device};
    state().bytes_on_device = after;
    *pointer = found;
    return cudaSuccess;
}

cudaError_t release(void* pointer, bool on_device, const char* caller) {
    if (pointer == nullptr) return cudaSuccess;
    if (const cudaError_t code = allowed_while_capturing(caller)) return code;
    const auto block = state().blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (block == state().blocks.end() || block->second.on_device != on_device)
        return illegal(cudaErrorInvalidValue, std::string(caller) + " of what it did not give");
    if (on_device) state().bytes_on_device -= static_cast<int64_t>(block->second.bytes);
    munmap(pointer, block->second.bytes);
    state().blocks.erase(block);
    return cudaSuccess;
}

// The block that an address lies in, or nullptr; `left` is what of it follows.
const Block* block_of(const void* pointer, size_t* left = nullptr) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto next = state().blocks.upper_bound(address);
    if (next == state().blocks.begin()) return nullptr;
    const auto& [start, block] = *--next;
    if (address >= start + block.bytes) return nullptr;
    if (left != nullptr) *left = start + block.bytes - address;
    return &block;
}

struct Places {
    const Block *to, *from;

    bool to_device() const { return to != nullptr && to->on_device; }
    bool from_device() const { return from != nullptr && from->on_device; }
    bool pageable() const { return to == nullptr || from == nullptr; }
};

cudaError_t placed(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, Places& places) {
    size_t room = bytes, source = bytes;
    places = {block_of(to, &room), block_of(from, &source)};
    if (room < bytes || source < bytes) return illegal(cudaErrorInvalidValue, "a copy beyond its memory");
    const bool to_device = places.to_device(), from_device = places.from_device();
    const bool fits = kind == cudaMemcpyDefault || ((kind == cudaMemcpyHostToDevice) == (to_device && !from_device) &&
                                                    (kind == cudaMemcpyDeviceToHost) == (!to_device && from_device));
    return fits ? cudaSuccess : illegal(cudaErrorInvalidValue, "a copy of another kind than its memory's");
}

void move(void* to, const void* from, size_t bytes, const Places& places) {
    if (places.from_device()) {
        if (!places.to_device()) std::memset(to, kArrives, bytes);
    } else if (!places.to_device()) {
        std::memmove(to, from, bytes);
    }
}

}  // namespace
}  // namespace rehearsal

using namespace rehearsal;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    const Lock lock;
    return allocate(pointer, bytes, true, "cudaMalloc");
}

cudaError_t cudaFree(void* pointer) {
    const Lock lock;
    count(kDeviceFrees, "cudaFree");
    return release(pointer, true, "cudaFree");
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    const Lock lock;
    return allocate(pointer, bytes, false, "cudaHostAlloc");
}

cudaError_t cudaFreeHost(void* pointer) {
    const Lock lock;
    return release(pointer, false, "cudaFreeHost");
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    const Lock lock;
    *total = static_cast<size_t>(kMemoryBytes);
    *free = static_cast<size_t>(kMemoryBytes - state().bytes_on_device);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    const Lock lock;
    const Block* block = block_of(pointer);
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    if (block == nullptr) return cudaSuccess;
    attributes->type = block->on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->device = 0;
    attributes->devicePointer = const_cast<void*>(pointer);
    attributes->hostPointer = block->on_device ? nullptr : const_cast<void*>(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle) {
    const Lock lock;
    Places places;
    if (const cudaError_t code = placed(to, from, bytes, kind, places)) return code;
    Stream* stream = find(handle, "cudaMemcpyAsync");
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    // CUDA may wait for the stream before memory that the system may move is read, and does before it returns from a
    // copy to some.
    if (places.pageable()) {
        if (stream->capture != nullptr)
            return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "a copy of pageable memory is captured");
        count(kWaits, "a copy of pageable memory");
    }
    bool now = false;
    const cudaError_t code = take(handle, kCopies, "a copy", now);
    if (now) move(to, from, bytes, places);
    return code;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const Lock lock;
    count(kWaits, "cudaMemcpy");
    if (const cudaError_t code = allowed_while_capturing("cudaMemcpy")) return code;
    Places places;
    if (const cudaError_t code = placed(to, from, bytes, kind, places)) return code;
    bool now = false;
    const cudaError_t code = take(cudaStreamLegacy, kCopies, "cudaMemcpy", now);
    if (now) move(to, from, bytes, places);
    return code;
}

cudaError_t cudaMemsetAsync(void* to, int, size_t bytes, cudaStream_t stream) {
    const Lock lock;
    size_t room = 0;
    if (block_of(to, &room) == nullptr || room < bytes)
        return illegal(cudaErrorInvalidValue, "a fill beyond its memory");
    return take(stream, kFills, "a fill");
}

}  // extern "C"
