#include "gradient_moments.cuh"
#include "launch.h"

namespace lswag {
namespace cuda {
namespace {

constexpr size_t kDynamicBytes = kStages * kStageBytes + kPatternBytes;

// On other architectures than sm_90a this is empty, which its size of shared memory tells.
template <class Product>
__global__ void __launch_bounds__(kMomentsThreads, 1)
    grouped_moments_kernel(const __grid_constant__ GroupedMoments task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ char memory[];
    __shared__ MomentsShared shared;
    const uint32_t stages = (Hopper::address(memory) + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
    moments_of_tiles<Hopper, Product>(Hopper(), task, shared, Ring(Hopper::address(shared.barriers), stages));
#else
    (void)task;
#endif
}

// Asks for the current device: a build for none like it holds no such kernel, or an empty one.
bool kernel_is_built() {
    cudaFuncAttributes attributes = {};
    const cudaError_t code = cudaFuncGetAttributes(&attributes, grouped_moments_kernel<BFloat16Product>);
    if (code == cudaErrorInvalidDeviceFunction || code == cudaErrorNoKernelImageForDevice) return succeeded(code);
    check(code, "cudaFuncGetAttributes");
    return attributes.sharedSizeBytes >= sizeof(MomentsShared);
}

template <class Product>
void launch(const GroupedMoments& task, const Queue& queue) {
    const int multiprocessors = attribute_of(queue.device, cudaDevAttrMultiProcessorCount);
    const auto kernel = grouped_moments_kernel<Product>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicBytes),
          "cudaFuncSetAttribute (shared memory of grouped_moments)");
    const int tiles = (task.end_tile - task.first_tile) / 2;
    const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
    kernel<<<static_cast<unsigned>(blocks), kMomentsThreads, kDynamicBytes, stream_of(queue)>>>(task);
    check(cudaGetLastError(), "launching grouped_moments");
}

}  // namespace

bool has_grouped_moments(int device) {
    if (compute_capability(device) != 90) return false;
    const OnDevice current({device, 0});
    return kernel_is_built();
}

void grouped_moments(const GroupedMoments& task, DType dtype, const Queue& queue) {
    const OnDevice device(queue);
    if (compute_capability(queue.device) != 90 || !kernel_is_built())
        throw std::runtime_error(
            "this kernel needs a device of compute capability 9.0 and a build for sm_90a "
            "(CMAKE_CUDA_ARCHITECTURES=90a)");
    if (task.end_tile <= task.first_tile) return;
    if (dtype == DType::bfloat16)
        launch<BFloat16Product>(task, queue);
    else
        launch<Float16Product>(task, queue);
}

}  // namespace cuda
}  // namespace lswag
