#include "launch.h"
#include "lswag/activation_patterns_cuda.h"
#include "packing_plan.h"

namespace lswag {
namespace cuda {
namespace {

template <Activation kActivation, class T, int kRun>
__global__ void __launch_bounds__(kPackThreads) pack_signs_kernel(const __grid_constant__ PackTask task) {
    __shared__ PackShared<kRun> shared;
    pack_tile<kActivation, T, kRun>(DeviceBlock<kPackThreads>(), task, blockIdx.x, blockIdx.y, shared);
}

template <Activation kActivation, class T, int kRun>
void launch(const PackTask& task, const Queue& queue) {
    const int64_t tile = int64_t{kPackWarps / task.octets} * 32 * kRun;
    const dim3 grid(grid_size((task.positions + tile - 1) / tile, "packing signs"), task.word_rows);
    pack_signs_kernel<kActivation, T, kRun><<<grid, kPackThreads, 0, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching pack_signs");
}

template <Activation kActivation, class T>
void launch_typed(const PackTask& task, int run, const Queue& queue) {
    if (run * T::kBytes == 16) return launch<kActivation, T, 16 / T::kBytes>(task, queue);
    if constexpr (T::kBytes == 2)
        if (run == 4) return launch<kActivation, T, 4>(task, queue);
    launch<kActivation, T, 1>(task, queue);
}

template <class T>
void launch_activation(Activation activation, const PackTask& task, int run, const Queue& queue) {
    switch (activation) {
        case Activation::none:
            return launch_typed<Activation::none, T>(task, run, queue);
        case Activation::relu:
            return launch_typed<Activation::relu, T>(task, run, queue);
        case Activation::relu6:
            return launch_typed<Activation::relu6, T>(task, run, queue);
        case Activation::gelu:
            return launch_typed<Activation::gelu, T>(task, run, queue);
        case Activation::gelu_tanh:
            return launch_typed<Activation::gelu_tanh, T>(task, run, queue);
        case Activation::silu:
            return launch_typed<Activation::silu, T>(task, run, queue);
        case Activation::hardswish:
            return launch_typed<Activation::hardswish, T>(task, run, queue);
    }
}

}  // namespace

void pack_signs(const SignPacking& task, const Queue& queue) {
    const PackTask plan = plan_packing(task);
    if (plan.word_rows == 0) return;
    const OnDevice device(queue);
    const int run = longest_run(task, plan.order);
    if (task.pre.dtype == DType::float32) return launch_activation<Float32>(task.activation, plan, run, queue);
    if (task.pre.dtype == DType::bfloat16) return launch_activation<BFloat16>(task.activation, plan, run, queue);
    launch_activation<Float16>(task.activation, plan, run, queue);
}

}  // namespace cuda
}  // namespace lswag
