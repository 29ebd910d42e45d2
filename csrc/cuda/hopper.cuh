// What a Hopper multiprocessor offers to a kernel whose warpgroups have different roles, one function an instruction:
// barriers in shared memory, asynchronous copies, matrix products by descriptors, registers handed from one warpgroup
// to another. Kernels are templates over this class; a test has another one, which does what the PTX ISA says on the
// CPU.
#pragma once

#include <cstdint>

#include "lswag/host_device.h"

namespace lswag {
namespace cuda {

constexpr int kWarpgroup = 128;

// A matrix in shared memory whose rows (the k of a product) are 128 bytes of neighbouring elements, in the 128-byte
// swizzle: bits 4 to 6 of an address are those of the place in the row, exclusive or the number of the row modulo 8.
// Eight rows are one pattern, which begins at a multiple of 1024 bytes. A matrix wider than 64 elements of 16 bits is
// several such panels, `panel_bytes` apart (the leading dimension of the PTX ISA, "MN-major"). See "Asynchronous
// Warpgroup Level Matrix Shared Memory Layout" there.
//
// These are the lower 32 bits of its descriptor; the upper ones, the distance of patterns and the kind of swizzle, are
// always the same.
LSWAG_DEVICE uint32_t matrix_descriptor(uint32_t address, uint32_t panel_bytes) {
    return (address & 0x3ffff) >> 4 | panel_bytes >> 4 << 16;
}
constexpr uint32_t kPatternBytes = 1024;
constexpr uint32_t kUpperDescriptor = kPatternBytes >> 4 | 1u << 30;

// Of the 16 bytes at `place` (0 to 7) of a row, from the beginning of their panel.
LSWAG_DEVICE uint32_t swizzled(int row, int place) {
    return static_cast<uint32_t>(row * 128 + ((place ^ (row & 7)) << 4));
}

// How far a descriptor moves for so many rows, which are a multiple of 8.
LSWAG_DEVICE uint32_t descriptor_step(int rows) { return static_cast<uint32_t>(rows * 128 >> 4); }

struct BFloat16Product {};
struct Float16Product {};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

class Hopper {
 public:
    __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
    __device__ __forceinline__ static int block() { return static_cast<int>(blockIdx.x); }
    __device__ __forceinline__ static int blocks() { return static_cast<int>(gridDim.x); }
    __device__ __forceinline__ static void sync() { __syncthreads(); }

    __device__ __forceinline__ static void sync_warp() { __syncwarp(); }

    // Named barriers 1 to 15 of the hardware; 0 is that of `sync`.
    __device__ __forceinline__ static void sync_some(int barrier, int threads) {
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
    }
    __device__ __forceinline__ static void arrive_at_some(int barrier, int threads) {
        asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
    }

    __device__ __forceinline__ static void make_barrier(uint32_t barrier, int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ static void arrive(uint32_t barrier) {
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
    }
    // Waits for the end of the barrier's phase of this parity. A mistake in the protocol ends the launch with an error
    // after some seconds.
    __device__ __forceinline__ static void wait(uint32_t barrier, uint32_t parity) {
        for (uint32_t tries = 0; !test(barrier, parity); ++tries)
            if (tries >> 24 != 0) __trap();
    }

    // Copies 16 bytes to shared memory, or fills them with zeros and reads nothing.
    __device__ __forceinline__ static void copy(uint32_t to, const void* from, bool live) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                     "r"(live ? 16 : 0)
                     : "memory");
    }
    // The barrier gets this thread's arrival when all that it has copied is there.
    __device__ __forceinline__ static void arrive_when_copied(uint32_t barrier) {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
    }
    __device__ __forceinline__ static void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
    // Copies belong to the generic proxy and products to the asynchronous one: what this thread knows to be in shared
    // memory, its products see after this.
    __device__ __forceinline__ static void show_copies_to_products() {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Orders what registers held before and what products do to them.
    __device__ __forceinline__ static void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
    __device__ __forceinline__ static void commit_products() {
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    // Until the groups of products before the last one have ended.
    __device__ __forceinline__ static void wait_for_all_but_last() {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    }

    // sums (+)= d^T a over 16 rows of panels d and a: a fragment of [64, 128] a thread.
    template <class Product>
    __device__ __forceinline__ static void multiply(float (&sums)[64], uint32_t d, uint32_t a, bool accumulate);

    // Until all products have ended: then `sums` may be read.
    __device__ __forceinline__ static void finish_products(float (&sums)[64]);

    template <int kRegisters>
    __device__ __forceinline__ static void give_registers() {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
    }
    template <int kRegisters>
    __device__ __forceinline__ static void take_registers() {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    }

    // A number that all threads of a warp have, for registers that a warp has once.
    __device__ __forceinline__ static int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
    // From the lane so many above in the warp.
    __device__ __forceinline__ static double from_above(double x, int lanes) {
        return __shfl_down_sync(0xffffffffu, x, lanes);
    }
    __device__ __forceinline__ static float inverse_root(float x) { return rsqrtf(x); }
    // In assembly, so that it is worked out once and not wherever it is used.
    __device__ __forceinline__ static uint32_t address(const void* shared) {
        uint32_t found;
        asm volatile("{\n.reg .u64 found;\ncvta.to.shared.u64 found, %1;\ncvt.u32.u64 %0, found;\n}"
                     : "=r"(found)
                     : "l"(shared));
        return found;
    }

 private:
    __device__ __forceinline__ static bool test(uint32_t barrier, uint32_t parity) {
        uint32_t over = 0;
        asm volatile(
            "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
            : "=r"(over)
            : "r"(barrier), "r"(parity)
            : "memory");
        return over != 0;
    }
};

// clang-format off
#define LSWAG_EIGHT(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
                          "+f"(x[i + 6]), "+f"(x[i + 7])
#define LSWAG_SIXTY_FOUR(x) LSWAG_EIGHT(x, 0), LSWAG_EIGHT(x, 8), LSWAG_EIGHT(x, 16), LSWAG_EIGHT(x, 24), \
                            LSWAG_EIGHT(x, 32), LSWAG_EIGHT(x, 40), LSWAG_EIGHT(x, 48), LSWAG_EIGHT(x, 56)
// The last four operands of the instruction: neither factor is negated, both are transposed.
#define LSWAG_MULTIPLY(type)                                                                                      \
    "{\n.reg .pred more;\n.reg .b64 left, right;\nsetp.ne.b32 more, %66, 0;\n"\
    "mov.b64 left, {%64, %67};\nmov.b64 right, {%65, %67};\n"                                                            \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "                  \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "                  \
    "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "                  \
    "%56, %57, %58, %59, %60, %61, %62, %63},"                                                                    \
    " left, right, more, 1, 1, 1, 1;\n}"
// clang-format on

template <>
__device__ __forceinline__ void Hopper::multiply<BFloat16Product>(float (&sums)[64], uint32_t d, uint32_t a,
                                                                  bool accumulate) {
    asm volatile(LSWAG_MULTIPLY("bf16")
                 : LSWAG_SIXTY_FOUR(sums)
                 : "r"(d), "r"(a), "r"(static_cast<int>(accumulate)), "r"(kUpperDescriptor)
                 : "memory");
}

template <>
__device__ __forceinline__ void Hopper::multiply<Float16Product>(float (&sums)[64], uint32_t d, uint32_t a,
                                                                 bool accumulate) {
    asm volatile(LSWAG_MULTIPLY("f16")
                 : LSWAG_SIXTY_FOUR(sums)
                 : "r"(d), "r"(a), "r"(static_cast<int>(accumulate)), "r"(kUpperDescriptor)
                 : "memory");
}

// The sums are operands, so that no compiler reads them earlier.
__device__ __forceinline__ void Hopper::finish_products(float (&sums)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LSWAG_SIXTY_FOUR(sums)::"memory");
}

#undef LSWAG_MULTIPLY
#undef LSWAG_SIXTY_FOUR
#undef LSWAG_EIGHT

#endif

}  // namespace cuda
}  // namespace lswag
