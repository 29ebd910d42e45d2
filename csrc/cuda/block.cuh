// A block of threads, as the algorithms of csrc/cuda see it. They are templates over it and know neither threadIdx nor
// warps, so that the same code runs on a GPU and, in tests, on threads of the CPU under sanitizers.
//
// A Block has `thread`, `threads` and `sync()`. Atomics on shared or global memory are the functions below; all are on
// integers, so that results depend on no order.
#pragma once

#include <cstdint>

#include "lswag/host_device.h"

namespace lswag {
namespace cuda {

#if defined(__CUDACC__)

template <int kThreads>
struct DeviceBlock {
    int thread;
    static constexpr int threads = kThreads;
    __device__ DeviceBlock() : thread(static_cast<int>(threadIdx.x)) {}
    __device__ void sync() const { __syncthreads(); }
};

LSWAG_DEVICE uint32_t fetch_add(uint32_t* p, uint32_t x) { return atomicAdd(p, x); }
LSWAG_DEVICE uint32_t fetch_or(uint32_t* p, uint32_t x) { return atomicOr(p, x); }
LSWAG_DEVICE void add(int64_t* p, int64_t x) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
LSWAG_DEVICE uint64_t compare_exchange(uint64_t* p, uint64_t expected, uint64_t x) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(expected),
                     static_cast<unsigned long long>(x));
}
template <class T>
LSWAG_DEVICE T load_shared(const T* p) {
    return *static_cast<const volatile T*>(p);
}
template <class T>
LSWAG_DEVICE void store_shared(T* p, T x) {
    *static_cast<volatile T*>(p) = x;
}
LSWAG_DEVICE int count_ones(uint64_t x) { return __popcll(x); }

#else

LSWAG_DEVICE uint32_t fetch_add(uint32_t* p, uint32_t x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
LSWAG_DEVICE uint32_t fetch_or(uint32_t* p, uint32_t x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }
LSWAG_DEVICE void add(int64_t* p, int64_t x) { __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
LSWAG_DEVICE uint64_t compare_exchange(uint64_t* p, uint64_t expected, uint64_t x) {
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <class T>
LSWAG_DEVICE T load_shared(const T* p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
template <class T>
LSWAG_DEVICE void store_shared(T* p, T x) {
    __atomic_store_n(p, x, __ATOMIC_RELAXED);
}
LSWAG_DEVICE int count_ones(uint64_t x) { return __builtin_popcountll(x); }

#endif

}  // namespace cuda
}  // namespace lswag
